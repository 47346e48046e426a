"""Multi-teacher distillation: recipe -> train."""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .recipe import Recipe as Recipe
    from .recipe import load_recipe as load_recipe
    from .train import TrainResult as TrainResult
    from .train import train as train

_MODULES = {"Recipe": "recipe", "TrainResult": "train", "load_recipe": "recipe", "train": "train"}
__all__ = list(_MODULES)


def __getattr__(name: str):
    # torch is imported with the first name that needs it, so that a recipe's mistakes are named before
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


class _Package(ModuleType):
    """Python sets an attribute of the package when a module in it is imported; `train` stays the function here."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name == "train" and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
