"""The recipe of a run: its fields, what they may be, and how a YAML file is read."""

from .fields import (
    CheckpointRecipe,
    GroupRecipe,
    LossRecipe,
    OptimizerRecipe,
    Recipe,
    StageRecipe,
    StudentRecipe,
    TeacherRecipe,
)
from .load import expand_paths, load_recipe, recipe_to_dict, save_recipe
from .validate import validate

__all__ = [
    "CheckpointRecipe",
    "GroupRecipe",
    "LossRecipe",
    "OptimizerRecipe",
    "Recipe",
    "StageRecipe",
    "StudentRecipe",
    "TeacherRecipe",
    "expand_paths",
    "load_recipe",
    "recipe_to_dict",
    "save_recipe",
    "validate",
]
