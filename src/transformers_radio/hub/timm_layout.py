"""RADIO ViTs as vision transformers of timm, at one square image size."""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from transformers_radio.disk import write_json
from transformers_radio.modeling import RadioConfig

from .export_nvidia import statistics, use_up

_ARCHITECTURE = "vit_base_patch16_224"  # every size below goes over its defaults
_NAMES = [
    (r"encoder\.layer\.(\d+)\.(norm[12]\..+|mlp\.fc[12]\..+)", r"blocks.\1.\2"),
    (r"encoder\.layer\.(\d+)\.attention\.o_proj\.(.+)", r"blocks.\1.attn.proj.\2"),
    (r"encoder\.layer\.(\d+)\.layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma"),
    (r"encoder\.layer\.(\d+)\.mlp\.norm\.(.+)", r"blocks.\1.mlp.norm.\2"),
    (r"norm\.(weight|bias)", r"norm.\1"),
]


def write_timm(model: Any, folder: Path, image_size: int) -> list[str]:
    """Writes config.json and model.safetensors; `timm.create_model("local-dir:FOLDER")` opens them.

    timm's `forward_features` is then the student's `last_hidden_state` for square images of `image_size` pixels,
    normalized with mean and std of its `pretrained_cfg`. Its first prefix token is timm's class token, the other CLS
    tokens and the registers are its register tokens.

    Weights of the model that are joined are used up, so that memory does not hold them twice.

    Returns:
        What was left out, in lines for a reader.

    Raises:
        ValueError: timm's network lacks something of the student; it is named.
    """
    config = model.config
    _check(config, model, image_size)
    tensors: dict[str, torch.Tensor] = {}
    state = model.state_dict()
    scaled = any((state[name] != 1).any() for name in state if name.endswith(".lambda1"))
    for name in list(state):
        if name.startswith(("adaptors.", "intermediate_normalizer.", "embeddings.", "input_conditioner.", "summary_")):
            continue
        if name.endswith(".lambda1") and not scaled:
            continue
        if ".k_proj." in name or ".v_proj." in name:
            continue  # with q_proj
        if ".q_proj." in name:
            parts = [name.replace("q_proj", f"{part}_proj") for part in "qkv"]
            place = re.sub(r"encoder\.layer\.(\d+)\.attention\.q_proj", r"blocks.\1.attn.qkv", name)
            tensors[place] = use_up(model, state, parts)
            continue
        place = next((f.expand(to) for pattern, to in _NAMES if (f := re.fullmatch(pattern, name))), "")
        if not place:
            raise ValueError(f"timm's vision transformer has no place for {name}")
        tensors[place] = state[name].contiguous()
    tensors |= _embeddings(model, image_size)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", _config(model, image_size, scaled))
    left_out = [f"adaptor {name}" for name in config.adaptors]
    left_out += ["the normalizer of intermediate features"] if config.intermediate_normalizer else []
    lines = [f"for {image_size} x {image_size} pixels; normalize with mean and std of pretrained_cfg"]
    return lines + ([f"left out, as timm has no place for it: {', '.join(left_out)}"] if left_out else [])


def _check(config: Any, model: Any, image_size: int) -> None:
    if not isinstance(config, RadioConfig):
        raise ValueError(f"only a RADIO ViT can be timm's vision transformer, and this is {type(model).__name__}")
    variants = {
        "use_swiglu_ffn": "a gated MLP",
        "feature_normalizer": "a feature normalizer",
        "window_size": "attention windows by default",
    }
    reasons = [f"it has {words} ({name})" for name, words in variants.items() if getattr(config, name)]
    if config.num_cls_tokens < 1:
        reasons.append("it has no CLS token (num_cls_tokens)")
    if config.hidden_act != "gelu" or config.layer_norm_eps != 1e-6:
        reasons.append(f"hidden_act is {config.hidden_act}, layer_norm_eps {config.layer_norm_eps}, not gelu and 1e-6")
    if reasons:
        raise ValueError(f"timm's vision transformer cannot hold this student: {'; '.join(reasons)}")
    if image_size < 1 or image_size % config.patch_size:
        raise ValueError(f"--image-size is {image_size}, expected a multiple of the patch size {config.patch_size}")


def _embeddings(model: Any, image_size: int) -> dict[str, torch.Tensor]:
    """Patches, tokens, and the position table as it is resized for this image."""
    config, embeddings = model.config, model.embeddings
    projection, tokens = embeddings.patch_projection, embeddings.cls_register_token.detach()
    side = image_size // config.patch_size
    # (D, C*p*p) -> (D, C, p, p)
    kernel = projection.weight.detach().unflatten(1, (config.num_channels, config.patch_size, config.patch_size))
    bias = torch.zeros(config.hidden_size, dtype=model.dtype) if projection.bias is None else projection.bias.detach()
    found = {
        "patch_embed.proj.weight": kernel.contiguous(),
        "patch_embed.proj.bias": bias,
        "pos_embed": embeddings.positions(1, side, side, model.dtype).detach().contiguous(),
        "cls_token": tokens[None, :1].contiguous(),  # (prefix, D) -> (1, 1, D)
    }
    if len(tokens) > 1:
        found["reg_token"] = tokens[None, 1:].contiguous()
    return found


def _config(model: Any, image_size: int, scaled: bool) -> dict[str, Any]:
    config, values = model.config, statistics(model)
    model_args = {
        "img_size": image_size,
        "patch_size": config.patch_size,
        "in_chans": config.num_channels,
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": config.mlp_ratio,
        "qkv_bias": config.qkv_bias,
        "init_values": 1.0 if scaled else None,
        "scale_mlp_norm": config.mlp_norm,
        "class_token": True,
        "reg_tokens": config.num_cls_tokens + config.num_registers - 1,
        "no_embed_class": True,
        "final_norm": config.final_norm,
        "global_pool": "token",
    }
    return {
        "architecture": _ARCHITECTURE,
        "num_classes": 0,
        "num_features": config.hidden_size,
        "global_pool": "token",
        "model_args": model_args,
        "pretrained_cfg": {
            "input_size": [config.num_channels, image_size, image_size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "mean": values["norm_mean"],
            "std": values["norm_std"],
            "num_classes": 0,
            "classifier": "head",
            "first_conv": "patch_embed.proj",
            **({"license": config.converted_from["license"]} if config.converted_from else {}),
        },
    }
