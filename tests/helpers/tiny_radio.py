"""A small RadioModel for the tests, and transformers' own class with its weights."""

import torch
import transformers

from transformers_radio import RadioConfig, RadioModel

TINY = dict(
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    mlp_ratio=2.0,
    patch_size=16,
    max_img_size=512,
    num_cls_tokens=3,
    num_registers=2,
    summary_idxs=[0, 2],
)
ADAPTORS = {
    "clip": {"summary_dim": 12, "feature_dim": 10, "hidden_dim": 16, "summary_token": 0, "teacher": "clip"},
    "sam": {
        "summary_dim": None,
        "feature_dim": 6,
        "hidden_dim": 16,
        "mlp_num_inner": 1,
        "spatial_mlp_version": "attn",
        "upsample_factor": 2,
    },
}


def scramble(model):
    """Weights far from their initialization (zero biases, unit scales), so that no weight can be lost unnoticed."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim:
            parameter.data = parameter.data + 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def build(**fields):
    """A model in eval mode whose weights are the same in every process."""
    torch.manual_seed(0)
    return scramble(RadioModel(RadioConfig(**{**TINY, **fields})).eval())


def build_with_adaptors(**fields):
    """Two blocks and two adaptors: one with both heads, one without a summary and with a finer grid."""
    tokens = {"num_cls_tokens": 2, "num_registers": 1, "summary_idxs": [0, 1]}
    sizes = {"num_hidden_layers": 2, "mlp_ratio": 4.0, "max_img_size": 256}
    return build(**{**tokens, **sizes, "adaptors": ADAPTORS, **fields})


def native(model):
    """transformers' own class with the weights of `model`."""
    config = transformers.RadioConfig(**{name: getattr(model.config, name) for name in TINY})
    config._attn_implementation = model.config._attn_implementation
    twin = transformers.RadioModel(config).eval().to(model.dtype)
    twin.input_conditioner.float()  # in half precision it rounds mean and std, which ours keep
    twin.load_state_dict({key: value for key, value in model.state_dict().items() if key in twin.state_dict()})
    return twin
