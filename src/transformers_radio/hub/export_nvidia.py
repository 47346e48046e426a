"""Students in the Hub layout of NVIDIA's releases, which serving loaders (vLLM, SGLang, TensorRT-LLM) read."""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from transformers_radio.disk import write_json
from transformers_radio.modeling import RadioConfig

from .releases import find_release

# width, depth, heads, MLP ratio of the networks that the loaders know by name
_NAMED = {
    "vit_small_patch16_224": (384, 12, 6, 4.0),
    "vit_base_patch16_224": (768, 12, 12, 4.0),
    "vit_large_patch16_224": (1024, 24, 16, 4.0),
    "vit_huge_patch16_224": (1280, 32, 16, 4.0),
}
# names of this package -> NVIDIA's
_NAMES = [
    (r"embeddings\.patch_projection\.(.+)", r"model.patch_generator.embedder.\1"),
    (r"embeddings\.position_embedding", r"model.patch_generator.pos_embed"),
    (r"embeddings\.cls_register_token", r"model.patch_generator.cls_token.token"),
    (r"norm\.(weight|bias)", r"model.norm.\1"),
    (r"encoder\.layer\.(\d+)\.attention\.o_proj\.(.+)", r"model.blocks.\1.attn.proj.\2"),
    (r"encoder\.layer\.(\d+)\.mlp\.down_proj\.(.+)", r"model.blocks.\1.mlp.w3.\2"),
    (r"encoder\.layer\.(\d+)\.layer_scale([12])\.lambda1", r"model.blocks.\1.ls\2.grandma"),
    (r"encoder\.layer\.(\d+)\.((?:norm[12]|mlp)\..+)", r"model.blocks.\1.\2"),
    (r"adaptors\.([^.]+)\.summary_head\.(.+)", r"adaptors.\1.head_mlp.\2"),
    (r"adaptors\.([^.]+)\.feature_head\.(.+)", r"adaptors.\1.feat_mlp.\2"),
    (r"intermediate_normalizer\.(.+)", r"inter_feature_normalizer.\1"),
    (r"(feature_normalizer\..+|input_conditioner\..+|summary_idxs)", r"\1"),
]
# parts of one tensor there
_JOINED = {
    r"encoder\.layer\.(\d+)\.attention\.q_proj\.(weight|bias)": (
        ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        r"model.blocks.\1.attn.qkv.\2",
    ),
    r"encoder\.layer\.(\d+)\.mlp\.gate_proj\.(weight|bias)": (
        ("mlp.gate_proj", "mlp.up_proj"),
        r"model.blocks.\1.mlp.w12.\2",
    ),
}


def check_loader(model: Any, loader: str) -> None:
    """Raises ValueError, with all reasons, if a serving loader would misread the student.

    Args:
        loader: "vllm", "sglang" or "tensorrt-llm".
    """
    config = model.config
    if not isinstance(config, RadioConfig):
        raise ValueError(f"{loader} reads RADIO ViTs only, and this is {type(model).__name__}")
    variants = {
        "final_norm": "a final norm",
        "mlp_norm": "a norm inside the MLP",
        "feature_normalizer": "a feature normalizer",
        "patch_bias": "a bias of the patch projection",
        "use_swiglu_ffn": "a gated MLP",
        "window_size": "attention windows by default",
    }
    reasons = [f"it has {words} ({name})" for name, words in variants.items() if getattr(config, name)]
    if config.summary_type != "cls":
        reasons.append("its summary is the mean of the features (summary_type)")
    if config.num_channels != 3:
        reasons.append(f"its images have {config.num_channels} channels (num_channels)")
    if config.summary_type == "cls" and config.summary_idxs != sorted(set(config.summary_idxs)):
        reasons.append(f"its summary has CLS tokens in another order ({config.summary_idxs})")
    if not config.qkv_bias:
        reasons.append("attention has no bias (qkv_bias)")
    if _known_name(config) is None:
        reasons.append(f"its size is none of {', '.join(_NAMED)}")
    if config.hidden_act != "gelu" or config.layer_norm_eps != 1e-6:
        reasons.append(f"hidden_act is {config.hidden_act}, layer_norm_eps {config.layer_norm_eps}, not gelu and 1e-6")
    if loader == "sglang" and config.num_cls_tokens != 1:
        reasons.append(f"it has {config.num_cls_tokens} CLS tokens, and SGLang takes one (num_cls_tokens)")
    if reasons:
        raise ValueError(f"{loader} cannot serve this student: {'; '.join(reasons)}")


def write_nvidia(model: Any, folder: Path, serving: bool) -> list[str]:
    """Writes config.json with `args`, and model.safetensors with names below `radio_model.`.

    Weights of the model that are joined or scaled are used up, so that memory does not hold them twice.

    Args:
        serving: for a serving loader: LayerScale is folded into `attn.proj` and `mlp.fc2`, and heads are left out.

    Returns:
        What was folded and left out, in lines for a reader.

    Raises:
        ValueError: the layout has no place for something of the student; it is named.
    """
    config = model.config
    if not isinstance(config, RadioConfig):
        raise ValueError(f"only a RADIO ViT is written in this layout, and this is {type(model).__name__}")
    _check_layout(config)
    state = dict(model.state_dict())
    scaled = [name for name in state if name.endswith(".lambda1")]
    is_scaled = any((state[name] != 1).any() for name in scaled)
    if serving and is_scaled:
        _fold_layer_scale(state, config)
    if serving or not is_scaled:
        state = {name: tensor for name, tensor in state.items() if not name.endswith(".lambda1")}
    left_out = []
    if serving:
        left_out = [f"adaptor {name}" for name in config.adaptors]
        left_out += ["the normalizer of intermediate features"] if config.intermediate_normalizer else []
        state = {n: t for n, t in state.items() if not n.startswith(("adaptors.", "intermediate_normalizer."))}
    save_file(_renamed(state, model), folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", _config(model, serving))
    if not serving and _own_windows(config):
        left_out.append(_own_windows(config))
    lines = [f"left out, as the loader has no place for it: {', '.join(left_out)}"] if left_out else []
    return lines + (["LayerScale is folded into attn.proj and mlp.fc2"] if serving and is_scaled else [])


def _check_layout(config: Any) -> None:
    if config.summary_type != "cls":
        raise ValueError("summary_type is 'mean'; NVIDIA's layout has CLS tokens only")
    if (config.window_size or config.train_window_sizes) and _own_windows(config):
        raise ValueError(
            f"{_own_windows(config)} differs from what NVIDIA's loader chooses by the version, which is "
            f"{find_version(config)!r}"
        )
    if config.hidden_act != "gelu" or config.layer_norm_eps != 1e-6:
        raise ValueError(
            f"hidden_act is {config.hidden_act!r}, layer_norm_eps {config.layer_norm_eps}; NVIDIA's layout has 'gelu' "
            "and 1e-6 only"
        )
    if config.window_prefix != "bypass":
        raise ValueError("window_prefix is 'average'; in NVIDIA's loader prefix tokens skip windows")


def _own_windows(config: Any) -> str:
    """The first field of windows that is not the one of the student's release, as NAME=VALUE; empty if all are."""
    release = find_release(find_version(config))
    windows = {"window_num_global": 4, "window_num_windowed": None, **((release.windows or {}) if release else {})}
    return next((f"{k}={getattr(config, k)}" for k, value in windows.items() if getattr(config, k) != value), "")


def find_version(config: Any) -> str | None:
    """The release that a student was converted from."""
    return (config.converted_from or {}).get("version")


def _fold_layer_scale(state: dict[str, torch.Tensor], config: Any) -> None:
    """`lambda * (W x + b)` is `(lambda * W) x + lambda * b`; computed in float32, in place."""
    last = "mlp.down_proj" if config.use_swiglu_ffn else "mlp.fc2"
    for index in range(config.num_hidden_layers):
        for scale, linear in (("layer_scale1", "attention.o_proj"), ("layer_scale2", last)):
            layer = f"encoder.layer.{index}"
            factor = state[f"{layer}.{scale}.lambda1"].float()
            for name, by in ((f"{layer}.{linear}.weight", factor[:, None]), (f"{layer}.{linear}.bias", factor)):
                state[name].copy_(state[name].float() * by)


def use_up(model: Any, state: dict[str, torch.Tensor], names: list[str]) -> torch.Tensor:
    """Weights of a model as one, along the first axis; they are taken out of `state` and of the model."""
    joined = torch.cat([state.pop(name) for name in names])
    for name in names:
        model.get_parameter(name).data = joined.new_empty(0)
    return joined


def _renamed(state: dict[str, torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
    new: dict[str, torch.Tensor] = {}
    joined = tuple(f".{name}." for parts, _ in _JOINED.values() for name in parts[1:])
    for name in list(state):
        if any(part in name for part in joined):
            continue  # with the first of its parts
        tensor = state[name]
        place = next(
            (found.expand(to) for pattern, to in _NAMES if (found := re.fullmatch(pattern, name)) is not None), None
        )
        for pattern, (parts, to) in _JOINED.items():
            found = re.fullmatch(pattern, name)
            if found is not None:
                place = found.expand(to)
                tensor = use_up(model, state, [name.replace(parts[0], part) for part in parts])
        if place is None:
            raise ValueError(f"{name} has no place in NVIDIA's layout")
        new[f"radio_model.{place}"] = tensor.contiguous()
    return new


def _known_name(config: Any) -> str | None:
    size = (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.mlp_ratio)
    return next((name for name, known in _NAMED.items() if known == size and config.patch_size == 16), None)


def statistics(model: Any) -> dict[str, list[float]]:
    """Mean and std of the input, as the model applies them; the configuration may have been given others since."""
    return {name: getattr(model.input_conditioner, name).flatten().tolist() for name in ("norm_mean", "norm_std")}


def _config(model: Any, serving: bool) -> dict[str, Any]:
    config, dtype = model.config, str(model.dtype).removeprefix("torch.")
    tokens = config.num_cls_tokens
    adaptors = {} if serving else config.adaptors
    args: dict[str, Any] = {
        "model": _known_name(config) or f"vit_custom_patch{config.patch_size}",
        "model_kwargs": None if _known_name(config) else {"num_heads": config.num_attention_heads},
        "in_chans": config.num_channels,
        "cpe_max_size": config.max_img_size,
        # for C CLS tokens and R registers a multiple of C + R gives R
        "register_multiple": tokens + config.num_registers if config.num_registers else None,
        "cpe_num_registers": None,
        "cls_token_per_teacher": tokens > 1,
        "teachers": _teachers(config, adaptors),
        "model_norm": config.final_norm,
        "mlp_version": "v2",
        "dtype": dtype,
    }
    return {
        "architectures": ["RADIOModel"],
        "model_type": "radio",
        "args": args,
        "version": find_version(config) or "",
        "patch_size": config.patch_size,
        "max_resolution": config.max_img_size,
        "preferred_resolution": [config.preferred_resolution] * 2,
        "adaptor_names": list(adaptors) or None,
        "adaptor_configs": {name: _adaptor_config(entry) for name, entry in adaptors.items()},
        "vitdet_window_size": config.window_size or None,
        "feature_normalizer_config": {"embed_dim": config.hidden_size} if config.feature_normalizer else None,
        "inter_feature_normalizer_config": None
        if serving or config.intermediate_normalizer is None
        else {
            "num_intermediates": config.num_hidden_layers,
            "embed_dim": config.hidden_size,
            "rot_per_layer": config.intermediate_normalizer == "per_layer",
        },
        **statistics(model),
        "converted_from": config.converted_from,
        "torch_dtype": dtype,
    }


def _teachers(config: Any, adaptors: dict[str, Any]) -> list[dict[str, Any]]:
    """One teacher for each CLS token, by the name of an adaptor that reads it; further ones share the first token."""
    by_token = {entry["summary_token"]: name for name, entry in reversed(adaptors.items()) if entry["summary_dim"]}
    count = config.num_cls_tokens
    named = [by_token.get(token, f"teacher{token}") for token in range(count)]
    if count == 1:
        return [{"name": named[0], "use_summary": True}]
    return [
        {"name": name, "use_summary": token in config.summary_idxs, "token_slot": token}
        for token, name in enumerate(named)
    ]


def _adaptor_config(entry: dict[str, Any]) -> dict[str, Any]:
    kind, _, model = entry["teacher"].partition(":")
    model, _, pretrained = model.partition(":")
    written = {"type": kind, "model": model, "pretrained": pretrained, "head_idx": entry["summary_token"]}
    written |= {"mlp_version": entry["mlp_version"], "spatial_mlp_version": entry["spatial_mlp_version"]}
    return {**written, "fd_upsample_factor": entry["upsample_factor"], "use_summary": entry["summary_dim"] is not None}
