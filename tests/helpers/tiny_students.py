"""One small student of each type, with an adaptor to a teacher with a summary."""

import torch

from transformers_radio.modeling import (
    ERadioConfig,
    ERadioModel,
    RadioConfig,
    RadioModel,
    RadioTimmConfig,
    RadioTimmModel,
)

ADAPTORS = {"clip": {"summary_dim": 12, "feature_dim": 10, "hidden_dim": 16, "teacher": "open_clip:nothing"}}


def tiny_student(kind, adaptors=ADAPTORS):
    """A student of type "radio" (patches of 16), "eradio" (stride 16, step 32) or "radio_timm" (stride 32)."""
    torch.manual_seed(0)
    if kind == "radio":
        sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "mlp_ratio": 2.0}
        tokens = {"num_cls_tokens": 2, "num_registers": 2, "summary_idxs": [0, 1]}
        model = RadioModel(RadioConfig(**sizes, **tokens, max_img_size=128, adaptors=adaptors))
    elif kind == "eradio":
        shape = {"embed_dim": 8, "stem_channels": 8, "depths": [1, 1, 1, 1], "num_heads": [2, 4]}
        model = ERadioModel(ERadioConfig(**shape, adaptors=adaptors))
    else:
        small = {"dims": [8, 8, 16, 24], "depths": [1, 1, 1, 1]}
        model = RadioTimmModel(RadioTimmConfig(timm_model="convnext_atto", model_args=small, adaptors=adaptors))
    return model.eval()


def one_size_student(adaptors=ADAPTORS):
    """A network of timm that is built for images of 32 x 32 pixels."""
    args = {"embed_dim": 24, "depth": 2, "num_heads": 2}
    config = RadioTimmConfig(timm_model="vit_tiny_patch16_224", model_args=args, image_size=32, adaptors=adaptors)
    return RadioTimmModel(config).eval()
