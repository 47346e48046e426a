"""A teacher of your own: any class that derives from `Teacher`."""

import importlib
import inspect
import os
from collections.abc import Callable
from typing import Any

from .base import Teacher, check_options


def python_teacher(
    checkpoint: str, image_size: int | None = None, dtype: str = "float32", target: str | None = None, **options: Any
) -> Teacher:
    """Build the class that `target` names, as `Class(checkpoint, image_size, dtype, **options)`.

    Args:
        checkpoint: handed to the class (weights file, Hub id, ...), `~` expanded; or, without `target`, itself the
            class's name.
        image_size, dtype: handed to the class.
        target: "module:Class", importable from where Python runs.
        options: handed to the class.

    Raises:
        ValueError: when the name has another form, the module or class does not exist, the class is no `Teacher`, or
            it does not take one of the options.
    """
    name = checkpoint if target is None else target
    module_name, _, class_name = name.partition(":")
    if not module_name or not class_name:
        raise ValueError(f"{name!r} names no class: write module:Class, as in my_teachers:MyTeacher")
    try:
        teacher_class = getattr(importlib.import_module(module_name), class_name)
    except ModuleNotFoundError as error:
        if error.name != module_name.split(".")[0] and error.name != module_name:
            raise  # the module exists, and lacks something itself
        raise ValueError(f"there is no module {module_name!r}: put it on PYTHONPATH") from error
    except AttributeError as error:
        raise ValueError(f"module {module_name!r} has no {class_name!r}") from error
    if not (inspect.isclass(teacher_class) and issubclass(teacher_class, Teacher)):
        raise ValueError(f"{name} is no subclass of transformers_radio.teachers.Teacher")
    factory: Callable[..., Teacher] = teacher_class
    check_options(name, factory, options)
    return factory(os.path.expanduser(checkpoint), image_size, dtype, **options)
