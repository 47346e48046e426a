"""Architectures of released teachers without their weights: exact dims, parameters and FLOPs with nothing downloaded.

The numbers come from the libraries where they have them (OpenCLIP's model configurations, segment_anything's builders)
and are written out where a library reads them from the checkpoint (transformers).
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from transformers_radio.modeling import RadioConfig, RadioModel

from .base import Teacher, check_options, require
from .checkpoints import resolve_checkpoint
from .open_clip import OpenClipTeacher
from .segment_anything import SegmentAnythingTeacher
from .transformers.clip import ClipTeacher
from .transformers.dino import DinoTeacher
from .transformers.internvit import InternVitTeacher, original_config
from .transformers.radio import RadioTeacher
from .transformers.siglip import SiglipTeacher

Known = tuple[Any, Callable[[], Any]]  # the teacher's class, and what builds its network with random weights


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
    with torch.device("meta"):
        if type == "open_clip":
            check_options(f"the {type} teacher {checkpoint}", OpenClipTeacher.from_checkpoint, options)
            teacher = OpenClipTeacher.without_weights(checkpoint, image_size)
        elif name in known:
            found, network = known[name]
            check_options(f"the {type} teacher {checkpoint}", found.from_checkpoint, options)
            shaping = {option: value for option, value in options.items() if option != "revision"}
            teacher = found(network(), image_size=image_size, **shaping)
        else:
            raise ValueError(
                f"{checkpoint} is not on the disk, and its shapes are not known without its weights (known of the "
                f"type {type}: {', '.join(known) or 'none'}). Download it and give its folder or file as checkpoint"
            )
        return teacher.cast(dtype).to("meta")


def _of_transformers(model: str, **fields: Any) -> Any:
    """A model of transformers from the fields of its configuration."""
    model_class = getattr(transformers, model)
    return model_class(model_class.config_class(**fields))


def _size(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}


def _clip(width: int, layers: int, heads: int, **fields: Any) -> Known:
    fields |= _size(width, layers, heads) | {"intermediate_size": 4 * width}
    return ClipTeacher, partial(_of_transformers, "CLIPVisionModelWithProjection", **fields)


def _dinov2(width: int, layers: int, heads: int, registers: int, **fields: Any) -> Known:
    fields |= _size(width, layers, heads) | {"patch_size": 14, "image_size": 518}
    if registers:
        fields["num_register_tokens"] = registers
    return DinoTeacher, partial(_of_transformers, "Dinov2WithRegistersModel" if registers else "Dinov2Model", **fields)


def _dinov3(width: int, layers: int, heads: int, mlp: int, **fields: Any) -> Known:
    fields |= _size(width, layers, heads) | {"intermediate_size": mlp}
    fields |= {"patch_size": 16, "image_size": 224, "num_register_tokens": 4}
    return DinoTeacher, partial(_of_transformers, "DINOv3ViTModel", **fields)


def _siglip(width: int, layers: int, heads: int, mlp: int, **fields: Any) -> Known:
    fields |= _size(width, layers, heads) | {"intermediate_size": mlp}
    return SiglipTeacher, partial(_of_transformers, "SiglipVisionModel", **fields)


def _intern_vit(layers: int, side: int) -> Known:
    """InternViT-6B: the first release has 48 layers, V1-2 lacks the last three."""
    config = original_config({"num_hidden_layers": layers, "image_size": side})
    return InternVitTeacher, partial(transformers.InternVLVisionModel, config)


def _radio(**fields: Any) -> Known:
    return RadioTeacher, lambda: RadioModel(RadioConfig.from_size(**fields))


def _segment_anything(builder: str) -> Known:
    return SegmentAnythingTeacher, lambda: require("segment_anything").sam_model_registry[builder]().image_encoder


GATED = {"use_gated_mlp": True, "hidden_act": "silu"}
C_RADIO_V4_H = {"size": "vit-h-16", "num_cls_tokens": 3, "num_registers": 7, "summary_idxs": [0, 1]}

# Teacher type -> checkpoint (for segment_anything the name of its file) -> the teacher; OpenCLIP has its own table.
KNOWN: dict[str, dict[str, Known]] = {
    "transformers": {
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
        "nvidia/C-RADIOv4-H": _radio(**C_RADIO_V4_H, preferred_resolution=512),
    },
    "segment_anything": {
        "sam_vit_h_4b8939.pth": _segment_anything("vit_h"),
        "sam_vit_l_0b3195.pth": _segment_anything("vit_l"),
        "sam_vit_b_01ec64.pth": _segment_anything("vit_b"),
    },
}
