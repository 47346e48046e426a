"""Architectures of released teachers without their weights: exact dims, parameters and FLOPs with nothing downloaded.

The numbers come from the libraries where they have them (OpenCLIP's model configurations, segment_anything's builders)
and are written out where a library reads them from the checkpoint (transformers).
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from transformers_radio.modeling import RadioConfig, RadioModel

from .base import Teacher, check_options, require, resolve_image_size
from .checkpoints import resolve_checkpoint
from .intern_vit import FIELDS, InternVitTeacher
from .open_clip import OpenClipTeacher
from .segment_anything import (
    PIXEL_MEAN,
    PIXEL_STD,
    SegmentAnythingTeacher,
    check_features,
    resize_positions,
)
from .transformers import ClipTeacher, DinoTeacher, RadioTeacher, SiglipTeacher

CLIP_NORMALISATION = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
IMAGENET_NORMALISATION = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
HALF_NORMALISATION = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


def is_on_disk(type: str, checkpoint: str) -> bool:
    """Whether `build_teacher` finds this checkpoint's weights without a network."""
    if type == "python":  # brings its own
        return True
    named = resolve_checkpoint(checkpoint).removeprefix("local-dir:")
    # "NAME:FILE" names an architecture and a weights file
    return Path(named).exists() or (":" in named and Path(named.partition(":")[2]).is_file())


def known_teacher(
    type: str, checkpoint: str, image_size: int | None = None, dtype: str = "float32", **options: Any
) -> Teacher:
    """The teacher that `build_teacher` with the same arguments would build, on the meta device: shapes and no values.

    Its `encode` takes meta tensors; `forward`, which looks at pixel values, does not work.

    Args:
        checkpoint: a key of `KNOWN`, for SAM also behind a folder or a Hub id; any `NAME:TAG` of OpenCLIP.

    Raises:
        ValueError: the checkpoint is none of these, or cannot take `image_size` or `options`.
    """
    known = KNOWN.get(type, {})
    name = checkpoint.rpartition("/")[2] if type == "segment_anything" else checkpoint
    build = partial(_open_clip, checkpoint) if type == "open_clip" else known.get(name)
    if build is None:
        raise ValueError(
            f"{checkpoint} is not on the disk, and its shapes are not known without its weights (known of the type "
            f"{type}: {', '.join(known) or 'none'}). Download it and give its folder or file as checkpoint"
        )
    check_options(f"the {type} teacher {checkpoint}", build, options)
    with torch.device("meta"):
        return build(image_size=image_size, dtype=dtype, **options).to("meta")


def _describe(teacher_class: type[Teacher], model: nn.Module, **promises: Any) -> Any:
    """A teacher of this class around a model that has no weights, which its own `__init__` would load."""
    teacher = teacher_class.__new__(teacher_class)
    Teacher.__init__(teacher, model, **promises)
    return teacher


def _open_clip(checkpoint: str, image_size: int | None = None, dtype: str = "float32") -> Teacher:
    open_clip = require("open_clip")
    name, _, tag = checkpoint.partition(":")
    config, weights = open_clip.get_model_config(name), open_clip.get_pretrained_cfg(name, tag)
    if not config or not weights:
        raise ValueError(
            f"{checkpoint} is not on the disk, and OpenCLIP knows no model and tag NAME:TAG of this name (see "
            "open_clip.list_pretrained()). Download it and give its folder as checkpoint"
        )
    vision = config["vision_cfg"]
    native = vision.setdefault("image_size", 224)
    if isinstance(vision.get("layers"), list) or not isinstance(native, int):
        raise ValueError(f"{checkpoint} is no vision transformer for square images; give its folder as checkpoint")
    vision["image_size"] = image_size or native
    if weights.get("quick_gelu"):
        config["quick_gelu"] = True
    model = open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP
    visual = model(**config).visual
    if hasattr(visual, "trunk"):  # a timm tower
        patch_size, feature_dim = visual.trunk.feature_info[-1]["reduction"], visual.trunk.num_features
    else:
        patch_size, feature_dim = visual.patch_size[0], visual.transformer.width
    return _describe(
        OpenClipTeacher,
        visual,
        image_size=resolve_image_size(image_size, native, patch_size),
        patch_size=patch_size,
        summary_dim=config["embed_dim"],
        feature_dim=feature_dim,
        mean=weights["mean"],
        std=weights["std"],
        dtype=dtype,
    )


def _segment_anything(
    builder: str, image_size: int | None = None, dtype: str = "float32", features: str = "trunk"
) -> Teacher:
    check_features(features)
    encoder = require("segment_anything").sam_model_registry[builder]().image_encoder
    patch_size = encoder.patch_embed.proj.kernel_size[0]
    image_size = resolve_image_size(image_size, encoder.img_size, patch_size)
    if image_size != encoder.img_size:
        encoder.pos_embed = resize_positions(encoder.pos_embed, image_size // patch_size)
    teacher = _describe(
        SegmentAnythingTeacher,
        encoder,
        image_size=image_size,
        patch_size=patch_size,
        summary_dim=None,
        feature_dim=encoder.neck[0].in_channels if features == "trunk" else encoder.neck[0].out_channels,
        mean=[value / 255 for value in PIXEL_MEAN],
        std=[value / 255 for value in PIXEL_STD],
        dtype=dtype,
    )
    teacher.features = features
    return teacher


def _transformers(
    teacher_class: type[Teacher],
    model_name: str,
    normalisation: Mapping[str, Sequence[float]],
    fields: dict[str, Any],
    image_size: int | None = None,
    dtype: str = "float32",
) -> Teacher:
    """A model of transformers from the fields of its configuration."""
    model_class = getattr(require("transformers"), model_name)
    config = model_class.config_class(**fields)
    return _describe(
        teacher_class,
        model_class(config),
        image_size=resolve_image_size(image_size, config.image_size, config.patch_size),
        patch_size=config.patch_size,
        summary_dim=fields.get("projection_dim", config.hidden_size),
        feature_dim=config.hidden_size,
        **normalisation,
        dtype=dtype,
    )


def _radio(fields: dict[str, Any], image_size: int | None = None, dtype: str = "float32") -> Teacher:
    config = RadioConfig.from_size(**fields)
    model = RadioModel(config)
    teacher = _describe(
        RadioTeacher,
        model,
        image_size=resolve_image_size(image_size, model.preferred_resolution, model.min_resolution_step),
        patch_size=model.patch_size,
        summary_dim=config.summary_dim,
        feature_dim=config.hidden_size,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        dtype=dtype,
    )
    teacher.adaptor = None
    return teacher


def _clip(width: int, layers: int, heads: int, **fields: Any) -> Callable[..., Teacher]:
    fields |= _size(width, layers, heads, intermediate_size=4 * width)
    return partial(_transformers, ClipTeacher, "CLIPVisionModelWithProjection", CLIP_NORMALISATION, fields)


def _dinov2(width: int, layers: int, heads: int, registers: int, **fields: Any) -> Callable[..., Teacher]:
    fields |= _size(width, layers, heads, patch_size=14, image_size=518)
    if registers:
        fields["num_register_tokens"] = registers
    name = "Dinov2WithRegistersModel" if registers else "Dinov2Model"
    return partial(_transformers, DinoTeacher, name, IMAGENET_NORMALISATION, fields)


def _dinov3(width: int, layers: int, heads: int, mlp: int, **fields: Any) -> Callable[..., Teacher]:
    fields |= _size(width, layers, heads, intermediate_size=mlp)
    fields |= {"patch_size": 16, "image_size": 224, "num_register_tokens": 4}
    return partial(_transformers, DinoTeacher, "DINOv3ViTModel", IMAGENET_NORMALISATION, fields)


def _siglip(width: int, layers: int, heads: int, mlp: int, **fields: Any) -> Callable[..., Teacher]:
    fields |= _size(width, layers, heads, intermediate_size=mlp)
    return partial(_transformers, SiglipTeacher, "SiglipVisionModel", HALF_NORMALISATION, fields)


def _intern_vit(layers: int, side: int) -> Callable[..., Teacher]:
    """InternViT-6B: the first release has 48 layers, V1-2 lacks the last three."""

    def build(image_size: int | None = None, dtype: str = "float32") -> Teacher:
        transformers = require("transformers")
        fields = {name: default for name, default in FIELDS.values()} | {
            "num_hidden_layers": layers,
            "image_size": side,
        }
        model = transformers.InternVLVisionModel(transformers.InternVLVisionConfig(**fields, use_mean_pooling=True))
        return _describe(
            InternVitTeacher,
            model,
            image_size=resolve_image_size(image_size, side, 14),
            patch_size=14,
            summary_dim=model.config.hidden_size,
            feature_dim=model.config.hidden_size,
            **IMAGENET_NORMALISATION,
            dtype=dtype,
        )

    return build


def _size(width: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    return {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, **more}


GATED = {"use_gated_mlp": True, "hidden_act": "silu"}
C_RADIO_V4_H = {"size": "vit-h-16", "num_cls_tokens": 3, "num_registers": 7, "summary_idxs": [0, 1]}

TRANSFORMERS: dict[str, Callable[..., Teacher]] = {
    "openai/clip-vit-base-patch16": _clip(768, 12, 12, patch_size=16, image_size=224, projection_dim=512),
    "openai/clip-vit-large-patch14": _clip(1024, 24, 16, patch_size=14, image_size=224, projection_dim=768),
    "openai/clip-vit-large-patch14-336": _clip(1024, 24, 16, patch_size=14, image_size=336, projection_dim=768),
    "facebook/dinov2-base": _dinov2(768, 12, 12, registers=0),
    "facebook/dinov2-large": _dinov2(1024, 24, 16, registers=0),
    "facebook/dinov2-giant": _dinov2(1536, 40, 24, registers=0, use_swiglu_ffn=True),
    "facebook/dinov2-with-registers-base": _dinov2(768, 12, 12, registers=4),
    "facebook/dinov2-with-registers-large": _dinov2(1024, 24, 16, registers=4),
    "facebook/dinov2-with-registers-giant": _dinov2(1536, 40, 24, registers=4, use_swiglu_ffn=True),
    "facebook/dinov3-vitl16-pretrain-lvd1689m": _dinov3(1024, 24, 16, 4096),
    "facebook/dinov3-vith16plus-pretrain-lvd1689m": _dinov3(1280, 32, 20, 5120, **GATED),
    "facebook/dinov3-vit7b16-pretrain-lvd1689m": _dinov3(
        4096, 40, 32, 8192, query_bias=False, value_bias=False, **GATED
    ),
    "google/siglip2-so400m-patch16-384": _siglip(1152, 27, 16, 4304, patch_size=16, image_size=384),
    "google/siglip2-giant-opt-patch16-384": _siglip(1536, 40, 16, 6144, patch_size=16, image_size=384),
    "OpenGVLab/InternViT-6B-224px": _intern_vit(48, 224),
    "OpenGVLab/InternViT-6B-448px-V1-2": _intern_vit(45, 448),
    "nvidia/C-RADIOv4-H": partial(_radio, {**C_RADIO_V4_H, "preferred_resolution": 512}),
}
SEGMENT_ANYTHING: dict[str, Callable[..., Teacher]] = {
    "sam_vit_h_4b8939.pth": partial(_segment_anything, "vit_h"),
    "sam_vit_l_0b3195.pth": partial(_segment_anything, "vit_l"),
    "sam_vit_b_01ec64.pth": partial(_segment_anything, "vit_b"),
}
# Teacher type -> checkpoint (for segment_anything its file's name) -> what builds it; OpenCLIP has a table of its own.
KNOWN = {"transformers": TRANSFORMERS, "segment_anything": SEGMENT_ANYTHING}
