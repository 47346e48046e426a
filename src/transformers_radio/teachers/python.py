"""A teacher of your own: any class that derives from `Teacher`."""

import importlib
import inspect
from typing import Any

from .base import Teacher, check_options


def choose_teacher(checkpoint: str, target: str | None = None, **options: Any) -> type[Teacher]:
    """The class that `target` names.

    Args:
        checkpoint: the class's name where there is no `target`.
        target: "module:Class", importable from where Python runs.
        options: what the class's `from_checkpoint` is to be called with.

    Raises:
        ValueError: when the name has another form, the module or class does not exist, the class is no `Teacher`, or
            it does not take one of the options.
    """
    name = checkpoint if target is None else target
    module_name, _, class_name = name.partition(":")
    if not module_name or not class_name:
        raise ValueError(f"{name!r} names no class: write module:Class, as in my_teachers:MyTeacher")
    try:
        teacher = getattr(importlib.import_module(module_name), class_name)
    except ModuleNotFoundError as error:
        if error.name != module_name.split(".")[0] and error.name != module_name:
            raise  # the module exists, and lacks something itself
        raise ValueError(f"there is no module {module_name!r}: put it on PYTHONPATH") from error
    except AttributeError as error:
        raise ValueError(f"module {module_name!r} has no {class_name!r}") from error
    if not (inspect.isclass(teacher) and issubclass(teacher, Teacher)):
        raise ValueError(f"{name} is no subclass of transformers_radio.teachers.Teacher")
    if teacher.from_checkpoint.__func__ is Teacher.from_checkpoint.__func__:  # type: ignore[attr-defined]
        raise ValueError(
            f"{name} has no from_checkpoint: add a classmethod from_checkpoint(cls, checkpoint, image_size=None, "
            'dtype="float32", **options) that builds the network, loads its weights and returns '
            "cls(network, ...).cast(dtype)"
        )
    check_options(name, teacher.from_checkpoint, options)
    return teacher
