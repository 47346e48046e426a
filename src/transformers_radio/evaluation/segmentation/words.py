"""Open-vocabulary segmentation: patch embeddings in a text encoder's space against the prompts of the classes.

A CLIP teacher's text space is that of its summary. There are two ways from a student's patches into it, neither of
which any loss has trained: the adaptor's summary head, applied to patch tokens instead of the class token; or the
adaptor's features (the teacher's patch tokens as its last block leaves them) through the teacher's own final norm and
projection. `eval segmentation` measures both.
"""

from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from transformers_radio.modeling import RadioModel
from transformers_radio.teachers import build_teacher

from .config import SegmentationConfig, SegmentationData
from .data import SegmentationSplit
from .inference import Encoder
from .probe import evaluate_segmentation


class TextHead(nn.Module):
    """Patch embeddings (B, D, h, w) -> cosine similarities (B, K, h, w) to the K classes of a zero-shot classifier.

    Args:
        classifier: unit vectors (K, D), from `zero_shot_classifier`.
    """

    def __init__(self, classifier: torch.Tensor):
        super().__init__()
        self.classifier: torch.Tensor
        self.register_buffer("classifier", classifier.float())

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        if embeddings.shape[1] != self.classifier.shape[1]:
            raise ValueError(
                f"Patches have {embeddings.shape[1]} dimensions and the text {self.classifier.shape[1]}; use the "
                "adaptor of the teacher that encoded the text."
            )
        return F.conv2d(F.normalize(embeddings, dim=1), self.classifier[:, :, None, None])


class PatchProjection(nn.Module):
    """An OpenCLIP ViT's own final norm and projection, for patch tokens: (..., width) -> (..., embed_dim).

    If the model averages normed patches, this is exactly the patch's part of the summary. If it reads the class token,
    as most do, it is that token's projection, applied to tokens that it was not trained on. Only these two small parts
    of the checkpoint stay in memory.

    Args:
        checkpoint: as for the open_clip teacher.

    Raises:
        ValueError: a tower without such a projection (timm towers such as SigLIP's, ResNets, attention pooling).
    """

    def __init__(self, checkpoint: str):
        super().__init__()
        visual = build_teacher("open_clip", checkpoint).model
        if getattr(visual, "proj", None) is None or getattr(visual, "attn_pool", None) is not None:
            raise ValueError(
                f"{checkpoint} has no projection from a patch to the text space (it pools by attention, or is "
                "not a ViT of OpenCLIP); use summary_head_patches."
            )
        self.ln_post: nn.Module = visual.ln_post
        self.proj: nn.Parameter = visual.proj

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.ln_post(features) @ self.proj


def summary_head_patches(model: RadioModel, adaptor: str) -> Encoder:
    """float (B, 3, H, W) in [0, 1] -> the patch tokens through the adaptor's summary head (B, h*w, D), and (h, w)."""
    head = _adaptor(model, adaptor).summary_head

    def encode(images: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        output = model(images, adaptors=[])
        return head(output.features), output.grid

    return encode


def projected_patches(model: RadioModel, adaptor: str, projection: nn.Module) -> Encoder:
    """float (B, 3, H, W) in [0, 1] -> the adaptor's features through a `PatchProjection` (B, h*w, D), and (h, w)."""
    _adaptor(model, adaptor)

    def encode(images: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        output = model(images, adaptors=[adaptor]).adaptors[adaptor]
        return projection(output.features), output.grid

    return encode


def _adaptor(model: RadioModel, name: str) -> Any:
    """The adaptor of this name; ValueError unless it has a summary."""
    if name not in model.adaptors or model.adaptors[name].summary_head is None:
        usable = [key for key, one in model.adaptors.items() if one.summary_head is not None]
        raise ValueError(f"{name!r} is not an adaptor with a summary; the model has {', '.join(usable) or 'none'}.")
    return model.adaptors[name]


def dense_zero_shot(
    encode: Encoder,
    model_name: str,
    classifier: torch.Tensor,
    data: SegmentationData,
    config: SegmentationConfig,
    how: str,
) -> dict[str, Any]:
    """Scores of the most similar class of each pixel on the split "validation", without any training.

    Similarities are resized bilinearly to the label maps. Names that describe no thing ("background") do badly: leave
    such a class out with `reduce_labels` if its number is 0.

    Args:
        encode: float images in [0, 1] (B, 3, H, W) -> patch embeddings in the text space (B, h*w, D), and (h, w).
        classifier: unit vectors (K, D) in the order of `data.classes`, on any device.
        config: the probe's; only its test settings and `mixed_precision` are used.
        how: a line for the report: which patches, which templates.
    """
    config.check()
    if len(classifier) != len(data.classes):
        raise ValueError(f"The classifier has {len(classifier)} classes, {data.name} has {len(data.classes)}.")
    samples = SegmentationSplit(data, "validation")
    accelerator = Accelerator(mixed_precision="no")
    head = TextHead(classifier).to(accelerator.device)
    scores = evaluate_segmentation(encode, head, samples, len(data.classes), config, data.ignore_index)
    return {
        "protocol": f"dense zero-shot, {how}; test: {config.test_protocol}",
        "model": model_name,
        "data": data.name,
        "num_classes": len(data.classes),
        "processes": accelerator.num_processes,
        **scores,
        "IoU": dict(zip(data.classes, scores["IoU"], strict=True)),
    }
