"""Multi-teacher distillation: recipe -> train."""

from .recipe import Recipe, load_recipe
from .train import TrainResult, train

__all__ = ["Recipe", "TrainResult", "load_recipe", "train"]
