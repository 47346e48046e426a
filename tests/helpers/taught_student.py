"""A small student that records the quickstart's teachers, which come with the package."""

import torch

from transformers_radio import RadioConfig, RadioImageProcessor, RadioModel

CLIP = "open_clip:package:quickstart/teachers/clip"
DINOV2 = "transformers:package:quickstart/teachers/dinov2"
SAM = "segment_anything:package:quickstart/teachers/sam/sam.pth"


def adaptor(teacher, summary_dim=None, **options):
    entry = {"summary_dim": summary_dim, "feature_dim": 192, "hidden_dim": 16, "teacher": teacher}
    return {**entry, **options}


def save_taught_student(folder, **adaptors):
    """The folder of a student with patches of 8 and sides up to 128; without `adaptors`, those of all three."""
    torch.manual_seed(0)
    adaptors = adaptors or {"clip": adaptor(CLIP, 128), "dinov2": adaptor(DINOV2, 192), "sam": adaptor(SAM)}
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8, "max_img_size": 128}
    config = RadioConfig(**sizes, preferred_resolution=64, adaptors=adaptors)
    RadioModel(config).eval().save_pretrained(folder)
    RadioImageProcessor(size={"height": 64, "width": 64}, size_divisor=8).save_pretrained(folder)
    return str(folder)
