"""Frozen teachers, one file a family, one contract: `build_teacher(...)(images in [0, 1]) -> TeacherOutput`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .base import Teacher as Teacher
    from .base import TeacherOutput as TeacherOutput
    from .base import digest_weights as digest_weights
    from .checkpoints import portable_checkpoint as portable_checkpoint
    from .checkpoints import resolve_checkpoint as resolve_checkpoint
    from .open_clip import load_text_encoder as load_text_encoder
    from .segment_anything import load_sam as load_sam

# type -> the module in this package, and what it has to make one
TEACHERS = {
    "open_clip": ("open_clip", "OpenClipTeacher"),
    "transformers": ("transformers", "transformers_teacher"),
    "segment_anything": ("segment_anything", "SegmentAnythingTeacher"),
    "timm": ("timm", "TimmTeacher"),
    "python": ("python", "python_teacher"),
}
_MODULES = {
    "Teacher": "base",
    "TeacherOutput": "base",
    "digest_weights": "base",
    "load_sam": "segment_anything",
    "load_text_encoder": "open_clip",
    "portable_checkpoint": "checkpoints",
    "resolve_checkpoint": "checkpoints",
}
__all__ = ["TEACHERS", "build_teacher", *_MODULES]


def __getattr__(name: str):
    # torch is imported with the first name that needs it, so that a mistyped teacher is named before
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def build_teacher(
    type: str, checkpoint: str, image_size: int | None = None, dtype: str = "float32", **options: Any
) -> "Teacher":
    """A frozen teacher, on the CPU; its libraries are imported here and not before.

    Args:
        type: one of `TEACHERS`.
        checkpoint: Hub id, local path (`~` is expanded), or `package:PATH` in the installed package; each type
            documents its forms.
        image_size: side of the square input; None for the checkpoint's own.
        dtype: of weights and activations: "float32", "bfloat16" or "float16". Outputs are float32 always.
        options: `features` ("trunk" or "neck") for SAM, `adaptor` for RADIO, `target` and your own for "python",
            `trust_remote_code` and `revision` for models whose code is in their repository.

    Raises:
        OSError: when there is no such checkpoint.
        ValueError: for an unknown type or option, an impossible image_size, or weights that are damaged or do not fit.
        ImportError: when the type's library is not installed; names the pip extra.
    """
    from transformers_radio.modeling.errors_radio import naming_checkpoint

    from .base import check_options
    from .checkpoints import resolve_checkpoint

    if type not in TEACHERS:
        raise ValueError(f"teacher type {type!r} is unknown: use one of {', '.join(TEACHERS)}")
    module, name = TEACHERS[type]
    make = getattr(import_module(f".{module}", __name__), name)
    if type not in ("transformers", "python"):  # these two check the options of the class that they choose
        check_options(f"the {type} teacher", make, options)
    if type == "python":  # whose checkpoint is its own affair
        return make(checkpoint, image_size, dtype, **options)
    checkpoint = resolve_checkpoint(checkpoint)
    with naming_checkpoint(checkpoint):
        return make(checkpoint, image_size, dtype, **options)
