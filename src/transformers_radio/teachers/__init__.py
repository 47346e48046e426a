"""Frozen teachers, one file a family, one contract: `build_teacher(...)(images in [0, 1]) -> TeacherOutput`."""

from collections.abc import Callable
from typing import Any

from transformers_radio.teachers.base import Teacher, TeacherOutput, check_options, digest_weights
from transformers_radio.teachers.checkpoints import portable_checkpoint, resolve_checkpoint
from transformers_radio.teachers.open_clip import OpenClipTeacher, load_text_encoder
from transformers_radio.teachers.python import python_teacher
from transformers_radio.teachers.segment_anything import SegmentAnythingTeacher, load_sam
from transformers_radio.teachers.timm import TimmTeacher
from transformers_radio.teachers.transformers import transformers_teacher

__all__ = [
    "TEACHERS",
    "Teacher",
    "TeacherOutput",
    "build_teacher",
    "digest_weights",
    "load_sam",
    "load_text_encoder",
    "portable_checkpoint",
    "resolve_checkpoint",
]

TEACHERS: dict[str, Callable[..., Teacher]] = {
    "open_clip": OpenClipTeacher,
    "transformers": transformers_teacher,
    "segment_anything": SegmentAnythingTeacher,
    "timm": TimmTeacher,
    "python": python_teacher,
}


def build_teacher(
    type: str, checkpoint: str, image_size: int | None = None, dtype: str = "float32", **options: Any
) -> Teacher:
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
        ValueError: for an unknown type or option, an impossible image_size, or weights that do not fit.
        ImportError: when the type's library is not installed; names the pip extra.
    """
    if type not in TEACHERS:
        raise ValueError(f"teacher type {type!r} is unknown: use one of {', '.join(TEACHERS)}")
    if type not in ("transformers", "python"):  # these two check the options of the class that they choose
        check_options(f"the {type} teacher", TEACHERS[type], options)
    if type != "python":  # whose checkpoint is its own affair
        checkpoint = resolve_checkpoint(checkpoint)
    return TEACHERS[type](checkpoint, image_size, dtype, **options)
