"""A student inside another model: below a task head, or as the backbone or vision tower of a larger model."""

from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from .inputs_radio import check_layers
from .modeling_radio import RadioPreTrainedModel

logger = logging.get_logger(__name__)


class RadioInnerModel(RadioPreTrainedModel):
    """A RADIO student at `self.model`, in a part without adaptors: loading leaves those of a checkpoint out silently.

    A student that is frozen as a whole (`model.model.requires_grad_(False)`) stays in eval mode while the other parts
    train: its features must not vary with the random position crops of training.
    """

    _keys_to_ignore_on_load_unexpected: list[str] | None = [r"^(model\.)?adaptors\."]
    model: Any

    def train(self, mode: bool = True):
        super().train(mode)
        rest_if_frozen(self.model)
        return self


class RadioPart(RadioInnerModel):
    """A backbone or vision tower, which transformers builds from a configuration, with random weights.

    A subclass sets `built_with = weight_state(self.model)` once it is built.
    """

    built_with: tuple[int, int] | None

    def run_student(
        self,
        pixel_values: torch.Tensor,
        output_hidden_states: bool | int | list[int] | None,
        output_attentions: bool | None,
        pixel_mask: torch.Tensor | None,
    ) -> tuple[Any, set[int]]:
        """The student's [`RadioModelOutput`] with all hidden states, and the numbers of those asked for.

        Raises:
            ValueError: Hidden states that do not exist, or an input that the student does not take.
        """
        self._warn_if_random()
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        wanted = check_layers(output_hidden_states, 1 + len(self.model.blocks))
        output = self.model(
            pixel_values,
            adaptors=[],
            output_hidden_states=True,
            output_attentions=output_attentions,
            pixel_mask=pixel_mask,
        )
        return output, wanted

    def _warn_if_random(self):
        """At the first forward: a warning if the weights are still those that the model was built with."""
        if self.built_with is None or torch.compiler.is_compiling():
            return
        folder = self.config.name_or_path
        if folder and weight_state(self.model) == self.built_with:
            logger.warning(
                f"{type(self).__name__} was built from the configuration of {folder}, but its weights are random. "
                f"Load them with transformers_radio.load_student(model, {folder!r})."
            )
        self.built_with = None


def rest_if_frozen(student: nn.Module):
    """Puts a student that is frozen as a whole into eval mode, for `train` of a model that it is a part of.

    In training mode its features would vary with position crops and windows, and statistics of batch norms would move.
    """
    if not any(parameter.requires_grad for parameter in student.parameters()):
        student.eval()


def weight_state(model: Any) -> tuple[int, int] | None:
    """Identifies the current weights of a student; None where they have no values yet, as in `from_pretrained`."""
    weight = next(model.parameters())
    return None if weight.is_meta or weight.is_inference() else (id(weight), weight._version)
