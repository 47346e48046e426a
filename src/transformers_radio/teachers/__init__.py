"""Frozen teachers, one file per family, one contract: `build_teacher(...)(images in [0, 1]) -> TeacherOutput`."""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .base import Teacher as Teacher
    from .base import TeacherOutput as TeacherOutput
    from .base import digest_weights as digest_weights
    from .checkpoints import portable_checkpoint as portable_checkpoint
    from .checkpoints import resolve_checkpoint as resolve_checkpoint
    from .segment_anything import load_sam as load_sam
    from .text import TextEncoder as TextEncoder

# type -> its module in this package, and the teacher's class there, or the function that chooses one by the checkpoint
TEACHERS = {
    "open_clip": ("open_clip", "OpenClipTeacher"),
    "transformers": ("transformers", "choose_teacher"),
    "segment_anything": ("segment_anything", "SegmentAnythingTeacher"),
    "timm": ("timm", "TimmTeacher"),
    "python": ("python", "choose_teacher"),
}
_MODULES = {
    "Teacher": "base",
    "TeacherOutput": "base",
    "TextEncoder": "text",
    "digest_weights": "base",
    "load_sam": "segment_anything",
    "portable_checkpoint": "checkpoints",
    "resolve_checkpoint": "checkpoints",
}
__all__ = ["TEACHERS", "build_teacher", "has_text", "load_text_encoder", "teacher_class", *_MODULES]


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
        image_size: side of the square input in pixels; None for the checkpoint's own.
        dtype: of weights and activations: "float32", "bfloat16" or "float16". Outputs are float32 always.
        options: `features` ("trunk" or "neck") for SAM, `adaptor` for RADIO, `target` and your own for "python",
            `trust_remote_code` and `revision` for models whose code is in their repository.

    Raises:
        OSError: when there is no such checkpoint.
        ValueError: for an unknown type or option, an impossible image_size, or weights that are damaged or do not fit.
        ImportError: when the type's library is not installed; names the pip extra.
    """
    from transformers_radio.modeling.errors_radio import naming_checkpoint

    from .checkpoints import resolve_checkpoint

    teacher = teacher_class(type, checkpoint, **options)
    if type == "python":  # its checkpoint and its errors are its own affair
        options.pop("target", None)
        return teacher.from_checkpoint(os.path.expanduser(checkpoint), image_size, dtype, **options)
    checkpoint = resolve_checkpoint(checkpoint)
    with naming_checkpoint(checkpoint):
        return teacher.from_checkpoint(checkpoint, image_size, dtype, **options)


def teacher_class(type: str, checkpoint: str, **options: Any) -> "type[Teacher]":
    """The class of a teacher, which says `has_text` and has `from_checkpoint`; no weights are read to find it.

    Args:
        type, checkpoint, options: as for `build_teacher`. Of a transformers checkpoint the configuration is read.

    Raises:
        OSError: when there is no such transformers checkpoint.
        ValueError: for an unknown type or option, or a name or configuration that says no class.
    """
    if type not in TEACHERS:
        raise ValueError(f"teacher type {type!r} is unknown: use one of {', '.join(TEACHERS)}")
    from .base import check_options
    from .checkpoints import resolve_checkpoint

    module, name = TEACHERS[type]
    found = getattr(import_module(f".{module}", __name__), name)
    if type == "transformers":
        return found(resolve_checkpoint(checkpoint), **options)
    if type == "python":
        return found(checkpoint, **options)
    check_options(f"the {type} teacher", found.from_checkpoint, options)
    return found


def has_text(teacher: str) -> bool | None:
    """Whether a teacher has a text tower; None where its configuration cannot be read to find out.

    Args:
        teacher: TYPE:CHECKPOINT, as a student's configuration names it. A `python` teacher counts as one without: no
            code is to run for this.
    """
    type, _, checkpoint = teacher.partition(":")
    if type not in TEACHERS or type == "python" or not checkpoint:
        return False
    try:
        return teacher_class(type, checkpoint).has_text
    except (OSError, ValueError):
        return None


def load_text_encoder(type: str, checkpoint: str) -> "TextEncoder":
    """The text tower of a teacher, on the CPU in float32. Its image tower does not stay in memory.

    Called with a list of N texts, it returns their embeddings (N, dim), float32 and not L2-normalized, in the space of
    the teacher's summaries.

    Args:
        type, checkpoint: as for `build_teacher`.

    Raises:
        OSError: when there is no such checkpoint.
        ValueError: for a teacher without a text tower, or weights or a tokenizer that are missing or do not fit.
    """
    from transformers_radio.modeling.errors_radio import naming_checkpoint

    from .checkpoints import resolve_checkpoint

    teacher = teacher_class(type, checkpoint)
    checkpoint = resolve_checkpoint(checkpoint)
    with naming_checkpoint(checkpoint):
        encoder = teacher.text_encoder(checkpoint)
    if encoder is None:
        raise ValueError(f"{checkpoint} is a {teacher.__name__}, which has no text tower")
    return encoder
