"""The configuration of a student from a release's arguments and the shapes of its tensors."""

import math
import re
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import logging

from transformers_radio.modeling import ERadioConfig, RadioConfig
from transformers_radio.modeling.errors_radio import shown

from .nvidia_checkpoint import Released
from .nvidia_heads import Teachers, whole
from .nvidia_keys import Weights
from .releases import Release, find_release

logger = logging.get_logger(__name__)

# name in a model's name -> width and heads; DINOv2's names abbreviate the size
_HEADS = {
    "tiny": (192, 3),
    "small": (384, 6),
    "base": (768, 12),
    "large": (1024, 16),
    "huge": (1280, 16),
    "so400m": (1152, 16),
    "giant": (1536, 24),
    "vits": (384, 6),
    "vitb": (768, 12),
    "vitl": (1024, 16),
    "vitg": (1536, 24),
}
# Arguments of the network that the tensors say (first line), or that change nothing outside of training.
_SIZES = {"embed_dim", "depth", "num_heads", "mlp_ratio", "patch_size", "in_chans", "init_values", "qkv_bias"}
_SIZES |= {"depths", "dim", "in_dim", "window_size", "max_resolution", "resolution"}
_IDLE = {"img_size", "num_classes", "class_token", "reg_tokens", "no_embed_class", "dynamic_img_size", "pretrained"}
_IDLE |= {"global_pool", "weight_init", "fix_init", "return_full_features", "num_register_tokens", "block_chunks"}
_IDLE |= {f"{name}_rate" for name in ("drop", "drop_path", "proj_drop", "attn_drop", "pos_drop", "patch_drop")}
_HUB_FIELDS = {"args", "version", "patch_size", "max_resolution", "preferred_resolution", "adaptor_names"}
_HUB_FIELDS |= {
    "adaptor_configs",
    "vitdet_window_size",
    "feature_normalizer_config",
    "inter_feature_normalizer_config",
}
_HUB_FIELDS |= {"torch_dtype", "_name_or_path", "auto_map", "norm_mean", "norm_std", "converted_from"}


def check_hub_fields(config: dict[str, Any]) -> None:
    """Raises ValueError for a field of a Hub config that nothing here honors."""
    general = set(PreTrainedConfig().to_dict())
    unknown = sorted(key for key in config if key not in _HUB_FIELDS | general and config[key] not in (None, {}, []))
    if unknown:
        raise ValueError(f"the config's field {unknown[0]} is {shown(config[unknown[0]])}: it is not known here")


def is_eradio(args: dict[str, Any], weights: Weights) -> bool:
    """Whether it is E-RADIO and not a ViT."""
    stem = any(name.startswith("model.patch_embed.conv_down.") for name in weights.shapes)
    model = str(args.get("model") or "")
    if stem != (re.search(r"e_?radio", model) is not None) and model:
        raise ValueError(f"args.model is {model!r}, but the tensors are those of {'E-RADIO' if stem else 'a ViT'}")
    return stem


def vit_config(
    released: Released, weights: Weights, teachers: Teachers, adaptors: dict[str, Any], version: str | None
) -> dict[str, Any]:
    """Fields of [`RadioConfig`].

    Raises:
        ValueError: tensors are missing or contradict the arguments, or an argument cannot be honored; both are named.
    """
    args, config = released.args or {}, released.config
    kwargs = _check_kwargs(args)
    _check_promised(args, kwargs, weights)
    width = _shape(weights, "patch_generator.embedder.weight")[0]
    depth = _depth(weights, kwargs)
    channels, patch = _patches(released, weights, kwargs)
    positions = _shape(weights, "patch_generator.pos_embed")
    side = math.isqrt(positions[-2])
    if len(positions) != 3 or side**2 != positions[-2]:
        raise ValueError(f"the position table is {positions}, expected (1, side * side, width)")
    size = max_size = side * patch
    stated = args.get("cpe_max_size") or config.get("max_resolution")
    if stated and whole(stated, "cpe_max_size") // patch != side:
        logger.warning("The position table is for %s pixels, cpe_max_size says %s: the table counts.", size, stated)
    gated = any(f"model.blocks.0.mlp.{name}.weight" in weights.shapes for name in ("w12", "gate_proj"))
    tokens, registers = _tokens(args, weights, teachers)
    fields: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": _heads(args, kwargs, width),
        "mlp_ratio": _mlp_ratio(weights, width, gated),
        "use_swiglu_ffn": gated,
        "num_channels": channels,
        "patch_size": patch,
        "max_img_size": max_size,
        "qkv_bias": "model.blocks.0.attn.qkv.bias" in weights.shapes,
        "patch_bias": "model.patch_generator.embedder.bias" in weights.shapes,
        "mlp_norm": "model.blocks.0.mlp.norm.weight" in weights.shapes,
        "final_norm": _final_norm(args, weights),
        "num_cls_tokens": tokens,
        "num_registers": registers,
        "summary_idxs": _summary_idxs(weights, teachers, tokens),
        "adaptors": adaptors,
        "preferred_resolution": _preferred(config, find_release(version), patch, max_size),
        **_windows(config, find_release(version), patch),
        **_normalizers(config, weights, depth),
        **_statistics(config, weights),
    }
    return fields


def eradio_config(
    released: Released, weights: Weights, adaptors: dict[str, Any], version: str | None
) -> dict[str, Any]:
    """Fields of [`ERadioConfig`]; the attention window is the one whose bias the file stores.

    Raises:
        ValueError: as `vit_config`.
    """
    args = released.args or {}
    _check_kwargs(args)
    if args.get("model_norm"):
        raise ValueError(f"args.model_norm is {args['model_norm']!r}, but E-RADIO's features have no norm")
    if any(name.startswith(("feature_normalizer.", "intermediate_normalizer.")) for name in weights.shapes):
        raise ValueError("the file has feature normalizers, which E-RADIO has not here")
    stem = _shape(weights, "patch_embed.conv_down.2.conv.weight")

    def count(pattern: str) -> int:
        numbers = {int(found.group(1)) for name in weights.shapes if (found := re.match(rf"model\.{pattern}", name))}
        if numbers != set(range(len(numbers))) or not numbers:
            raise ValueError(f"the file has blocks {sorted(numbers)} of {pattern}, expected all from 0 on")
        return len(numbers)

    attention = "levels.{}.blocks.0.attention_blocks.0.{}"
    width = 4 * stem[0]
    preferred = _preferred(released.config, find_release(version), 32, 1 << 16)
    largest = released.config.get("max_resolution") or args.get("cpe_max_size") or 2048
    return {
        "embed_dim": stem[0],
        "stem_channels": stem[1],
        "num_channels": _shape(weights, "patch_embed.conv_down.0.conv.weight")[1],
        "depths": [
            *(count(rf"levels\.{level}\.blocks\.(?:0\.)?m\.(\d+)\.") for level in (0, 1)),
            *(count(rf"levels\.{level}\.blocks\.(\d+)\.") for level in (2, 3)),
        ],
        "num_heads": [
            _shape(weights, attention.format(level, "attn.pos_emb_funct.cpb_mlp.2.weight"))[0] for level in (2, 3)
        ],
        "mlp_ratio": _ratio(_shape(weights, attention.format(2, "mlp.fc1.weight"))[0], width),
        "pre_convolution": f"model.{attention.format(3, 'pre_conv.conv.weight')}" in weights.shapes,
        "neck": "depthwise",
        "window_size": _eradio_window(weights),
        # the mean of the features is the summary that every head reads
        "adaptors": {name: {**adaptor, "summary_token": 0} for name, adaptor in adaptors.items()},
        "preferred_resolution": preferred or 512,
        "max_img_size": whole(largest, "max_resolution"),
        **_statistics(released.config, weights),
    }


def _eradio_window(weights: Weights) -> int | None:
    """The window of the bias tables `(1, heads, W*W, W*W)` in the file; None without any."""
    tables = [shape for name, shape in weights.shapes.items() if name.endswith(".pos_emb_funct.relative_bias")]
    windows = sorted({math.isqrt(math.isqrt(math.prod(shape[-2:]))) for shape in tables})
    if len(windows) > 1:
        raise ValueError(f"the file has attention windows of {windows} places (relative_bias), expected one size")
    return windows[0] if windows else None


def _check_kwargs(args: dict[str, Any]) -> dict[str, Any]:
    kwargs = args.get("model_kwargs") or {}
    if not isinstance(kwargs, dict):
        raise ValueError(f"args.model_kwargs is {shown(kwargs)}, expected arguments by name")
    unknown = sorted(key for key in kwargs if key not in _SIZES | _IDLE and kwargs[key] not in (None, False, 0, {}))
    if unknown:
        raise ValueError(f"args.model_kwargs.{unknown[0]} is {shown(kwargs[unknown[0]])}: it cannot be honored here")
    return kwargs


def _check_promised(args: dict[str, Any], kwargs: dict[str, Any], weights: Weights) -> None:
    """Raises ValueError if the arguments name a part of the blocks that the file lacks in all of them."""
    scale = f"args.model_kwargs.init_values is {kwargs.get('init_values')!r}" if kwargs.get("init_values") else ""
    norm = f"args.model is {args['model']!r}" if "mlpnorm" in str(args.get("model")) else ""
    for why, names, part in ((scale, ("ls1.", "layer_scale1."), "LayerScale"), (norm, ("mlp.norm.",), "MLP norm")):
        if why and not any(name.startswith(f"model.blocks.0.{one}") for name in weights.shapes for one in names):
            raise ValueError(f"{why}, but the file has no {part}")


def _shape(weights: Weights, name: str) -> tuple[int, ...]:
    shape = weights.shapes.get(f"model.{name}")
    if shape is None:
        raise ValueError(f"the file lacks {name} of the backbone, so it is no RADIO or a part of one")
    if len(shape) < 2 or 0 in shape:
        raise ValueError(f"{name} has shape {shape}, expected two axes or more")
    return shape


def _depth(weights: Weights, kwargs: dict[str, Any]) -> int:
    found = (re.match(r"model\.blocks\.(\d+)\.", name) for name in weights.shapes)
    numbers = {int(match.group(1)) for match in found if match}
    if not numbers or numbers != set(range(len(numbers))):
        raise ValueError(f"the file has blocks {sorted(numbers)}, expected all from 0 on")
    if kwargs.get("depth") not in (None, len(numbers)):
        raise ValueError(f"args.model_kwargs.depth is {kwargs['depth']}, but the file has {len(numbers)} blocks")
    return len(numbers)


def _patches(released: Released, weights: Weights, kwargs: dict[str, Any]) -> tuple[int, int]:
    """Channels and patch side."""
    channels = whole((released.args or {}).get("in_chans") or kwargs.get("in_chans") or 3, "args.in_chans")
    pixels = _shape(weights, "patch_generator.embedder.weight")[1]
    patch = math.isqrt(pixels // channels)
    if channels * patch**2 != pixels:
        raise ValueError(f"patches have {pixels} values, which are no square of {channels} channels (args.in_chans)")
    for where, fields in (("patch_size", released.config), ("model_kwargs.patch_size", kwargs)):
        stated = fields.get("patch_size")
        if stated not in (None, patch):
            raise ValueError(f"{where} says patches of {stated} pixels, but the tensors are for {patch}")
    return channels, patch


def _heads(args: dict[str, Any], kwargs: dict[str, Any], width: int) -> int:
    name = str(args.get("model") or "")
    if kwargs.get("num_heads"):
        heads = whole(kwargs["num_heads"], "args.model_kwargs.num_heads")
    else:
        size = next((size for key, size in _HEADS.items() if re.search(rf"(?<![a-z]){key}(?![a-z])", name)), None)
        known = size is not None
        size = size or next((size for size in _HEADS.values() if size[0] == width), None)  # a width of the releases
        if size is None or width != (kwargs.get("embed_dim") or size[0]):
            raise ValueError(
                f"args.model is {name!r}, which does not say how many heads attention has at width {width}; "
                "args.model_kwargs.num_heads would"
            )
        heads = size[1]
        if not known:
            logger.warning(
                "args.model is %r, which does not say how many heads attention has: %d are taken, as the releases of "
                "width %d have. args.model_kwargs.num_heads would say it.",
                name,
                heads,
                width,
            )
    if width % heads:
        raise ValueError(f"num_heads is {heads}, expected a divisor of the width {width}")
    return heads


def _ratio(wide: int, width: int) -> float:
    """The ratio whose product with `width`, rounded down, is `wide`."""
    ratio = wide / width
    return ratio if int(width * ratio) == wide else (wide + 0.5) / width


def _mlp_ratio(weights: Weights, width: int, gated: bool) -> float:
    if not gated:
        return _ratio(_shape(weights, "blocks.0.mlp.fc1.weight")[0], width)
    fused = weights.shapes.get("model.blocks.0.mlp.w12.weight")
    wide = fused[0] // 2 if fused else _shape(weights, "blocks.0.mlp.gate_proj.weight")[0]
    if wide % 8:
        raise ValueError(f"the gated MLP is {wide} wide, expected a multiple of 8")
    return _ratio(wide * 3 // 2, width)


def _final_norm(args: dict[str, Any], weights: Weights) -> bool:
    stored, stated = "model.norm.weight" in weights.shapes, bool(args.get("model_norm"))
    if stored != stated:
        raise ValueError(
            f"args.model_norm is {args.get('model_norm')!r}, but the file has {'a' if stored else 'no'} final norm: "
            "whether the features pass through one is not known"
        )
    return stored


def _tokens(args: dict[str, Any], weights: Weights, teachers: Teachers) -> tuple[int, int]:
    """CLS tokens and registers."""
    rows = _shape(weights, "patch_generator.cls_token.token")[0]
    tokens = teachers.num_tokens
    if tokens is None and args.get("cls_token_per_teacher"):
        raise ValueError("args.cls_token_per_teacher is set, but args.teachers is empty: CLS tokens are not known")
    tokens = tokens or 1
    registers = rows - tokens
    fixed, multiple = args.get("cpe_num_registers"), args.get("register_multiple")
    expected = None
    if fixed:
        expected, why = whole(fixed, "args.cpe_num_registers"), "cpe_num_registers"
    elif multiple and fixed != registers:
        multiple = whole(multiple, "args.register_multiple")
        expected, why = multiple - tokens % multiple, "register_multiple"
    if registers < 0 or expected not in (None, registers):
        raise ValueError(
            f"the file has {rows} CLS and register tokens, but args say {tokens} CLS"
            + (f" and {expected} registers ({why})" if expected is not None else " (teachers)")
        )
    return tokens, registers


def _summary_idxs(weights: Weights, teachers: Teachers, tokens: int) -> list[int]:
    if "summary_idxs" in weights.shapes:
        return [whole(index, "summary_idxs") for index in weights.read("summary_idxs").flatten().tolist()]
    found = teachers.summary_idxs if tokens > 1 else [0]
    if not found:
        raise ValueError("no teacher in args.teachers has use_summary, so there is no summary")
    return found


def _preferred(config: dict[str, Any], release: Release | None, step: int, largest: int) -> int | None:
    """The best side, a multiple of `step` up to `largest`; None where nobody says."""
    stated = config.get("preferred_resolution")
    if isinstance(stated, (list, tuple)):
        if len(set(stated)) != 1:
            raise ValueError(f"preferred_resolution is {shown(stated)}, expected a square")
        stated = stated[0]
    side = whole(stated or (release.preferred if release else 0), "preferred_resolution")
    return max(min(side, largest) // step, 1) * step if side else None


def _windows(config: dict[str, Any], release: Release | None, patch: int) -> dict[str, Any]:
    size = config.get("vitdet_window_size")
    if release is not None and release.windows is None:
        if size:
            raise ValueError(f"vitdet_window_size is {size}, but C-RADIOv3 has no attention windows")
        return {}
    return {
        "window_size": whole(size, "vitdet_window_size") if size else None,
        **((release.windows or {}) if release else {}),
    }


def _normalizers(config: dict[str, Any], weights: Weights, depth: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for part, key in (
        ("feature_normalizer", "feature_normalizer_config"),
        ("intermediate_normalizer", "inter_feature_normalizer_config"),
    ):
        stored = any(name.startswith(f"{part}.") for name in weights.shapes)
        if config.get(key) and not stored:
            raise ValueError(f"{key} is {shown(config[key])}, but the file has no tensors of it")
        if stored and part == "feature_normalizer":
            found[part] = True
        elif stored:
            alphas, rotation = (weights.shapes.get(f"{part}.{name}", ()) for name in ("alphas", "rotation"))
            if not alphas or alphas[0] != depth or len(rotation) not in (2, 3):
                raise ValueError(f"the normalizer of intermediate features is for {alphas} of {depth} blocks")
            found[part] = "per_layer" if len(rotation) == 3 else "shared"
    return found


def _statistics(config: dict[str, Any], weights: Weights) -> dict[str, Any]:
    """Mean and std of the input conditioner, which may be left out of a file; then the config's count."""
    names = ("norm_mean", "norm_std")
    stored = {name: f"conditioner.{name}" for name in names if f"conditioner.{name}" in weights.shapes}
    if len(stored) == 1:
        raise ValueError(f"the file has {next(iter(stored))} of the input conditioner and not the other statistic")
    found = {name: weights.read(key).float().flatten().tolist() for name, key in stored.items()}
    for name in names:
        stated = config.get(name)
        if stated is None:
            continue
        if not isinstance(stated, list) or not all(isinstance(value, (int, float)) for value in stated):
            raise ValueError(f"{name} is {shown(stated)}, expected a number for each channel")
        values = found.setdefault(name, [float(value) for value in stated])
        if len(values) != len(stated) or any(abs(a - b) > 1e-2 for a, b in zip(values, stated, strict=True)):
            raise ValueError(f"the config's {name} is {shown(stated)}, but the file has {shown(values)}")
    return found


def make_config(fields: dict[str, Any], eradio: bool) -> Any:
    """The configuration object."""
    return (ERadioConfig if eradio else RadioConfig)(**fields)
