"""A student in training as the Hugging Face folder that others load: what only training needs is folded in."""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers.utils import logging as transformers_logging

from transformers_radio.disk import remove, replace_whole, writing
from transformers_radio.modeling import RadioImageProcessor, RadioModel
from transformers_radio.training.phi_s.rotation import PhiS
from transformers_radio.training.recipe import Recipe
from transformers_radio.training.stability.spectral import fold_spectral

from .card import write_card
from .folder import MANIFEST

PREFIX = "student."
WHOLE_ON_MAIN = StateDictOptions(full_state_dict=True, cpu_offload=True)


def whole_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Weights and buffers of the prepared model by their plain names, whole, on the main process alone. Called on all
    processes together, as sharded weights have to be gathered."""
    state: Any = get_model_state_dict(model, options=WHOLE_ON_MAIN)
    return {name: value.contiguous() for name, value in state.items()}


def write_student(
    student: RadioModel,
    model_state: dict[str, torch.Tensor],
    averages: dict[str, torch.Tensor] | None,
    transforms: dict[str, PhiS],
    folder: Path,
) -> None:
    """Writes weights, config, remote code and image processor. Called on the main process alone.

    Args:
        student: gives the architecture; its weights are not read.
        model_state: the state of the whole `Distillation`.
        averages: by the same names, in place of the trained weights where given.
        transforms: teacher -> PHI-S, for heads that predict standardized features: the inverse goes into their last
            Linear.
    """
    state = {**model_state, **(averages or {})}
    state = {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}
    state = fold_spectral(state, averaged=averages is not None)
    config = type(student.config).from_dict(student.config.to_dict())
    with torch.device("meta"):
        plain = type(student)(config)
    plain.load_state_dict(state, assign=True)
    for name, transform in transforms.items():
        if name in plain.adaptors:
            last = _last_linear(plain.adaptors[name].feature_head)
            weight, bias = transform.fold(last)
            last.weight, last.bias = nn.Parameter(weight), nn.Parameter(bias)
    transformers_logging.disable_progress_bar()  # it would break up the training's own
    plain.save_pretrained(folder)
    transformers_logging.enable_progress_bar()
    side = plain.preferred_resolution
    processor = RadioImageProcessor(size={"height": side, "width": side}, size_divisor=plain.min_resolution_step)
    processor.save_pretrained(folder)


def publish_student(checkpoint: Path, recipe: Recipe, teachers: dict[str, dict[str, Any]]) -> Path:
    """Copies the student of the last checkpoint to output_dir/student, whole or not at all, and adds its model card.

    Called on the main process alone.

    Args:
        teachers: as `describe_teachers` gives them.

    Raises:
        OSError: it could not be written; nothing is left of the copy, and the checkpoint stays.
    """
    path = Path(recipe.output_dir) / "student"
    with writing(path), replace_whole(path) as temporary:
        remove(temporary)  # left by a run that was killed here
        shutil.copytree(checkpoint, temporary, ignore=shutil.ignore_patterns("training_state", MANIFEST))
        write_card(temporary, recipe, teachers)
    return path


def _last_linear(head: nn.Module) -> nn.Linear:
    return [module for module in head.modules() if isinstance(module, nn.Linear)][-1]
