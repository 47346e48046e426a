"""A small student of every type, with the same weights in every process."""

import torch

from transformers_radio import ERadioConfig, ERadioModel, RadioTimmConfig, RadioTimmModel

from .tiny_radio import build_with_adaptors, scramble

ADAPTORS = {
    "clip": {"summary_dim": 8, "feature_dim": 12, "hidden_dim": 16},
    "sam": {"summary_dim": None, "feature_dim": 6, "hidden_dim": 8},
}
ERADIO = {"embed_dim": 4, "depths": [1, 1, 1, 1], "num_heads": [1, 2], "stem_channels": 4}
CONVNEXT = {"dims": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}


def small_student(model_type: str):
    """A model in eval mode, of a type in `STUDENTS`."""
    if model_type == "radio":
        return build_with_adaptors()
    torch.manual_seed(0)
    if model_type == "eradio":
        return scramble(ERadioModel(ERadioConfig(**ERADIO, adaptors=ADAPTORS))).eval()
    config = RadioTimmConfig(timm_model="convnext_tiny", model_args=CONVNEXT, max_img_size=256, adaptors=ADAPTORS)
    return scramble(RadioTimmModel(config)).eval()
