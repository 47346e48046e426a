"""Pictures of what models see: features, attention, position tables, heat maps, masks."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .teacher_student import teacher_student_figure as teacher_student_figure

__all__ = ["teacher_student_figure"]


def __getattr__(name: str):
    # torch is imported with the first name that needs it, so that a mistyped picture or model is named before
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".teacher_student", __name__), name)
