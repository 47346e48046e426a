"""The student that every swap takes: in memory, or by its folder."""

from typing import Any

from transformers_radio.evaluation.models.encoder import load_student
from transformers_radio.modeling.errors_radio import check_source
from transformers_radio.modeling.student_radio import RadioStudentMixin


def open_student(student: Any) -> Any:
    """`student` itself if it is a model, else the one of this folder or Hub id, float32, in eval mode.

    Raises:
        OSError: there is no such folder or Hub id.
        ValueError: neither a student nor the name of one, or weights that do not fit.
    """
    if isinstance(student, RadioStudentMixin):
        return student
    check_source("student", student)
    return load_student(str(student))
