"""A student's weights in the backbone or vision tower of a larger model, such as UperNet, DPT or LLaVA."""

from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from .errors_radio import check_source, shown
from .modeling_radio import RadioModel

logger = logging.get_logger(__name__)

# what changes the features without changing the shape of any weight
_SAME = ("num_attention_heads", "num_cls_tokens", "num_registers", "hidden_act", "layer_norm_eps")


def load_student(model: nn.Module, student: Any) -> nn.Module:
    """Put a student's weights into the RADIO backbone or vision tower inside `model`, in place.

    transformers builds the parts of UperNet, Mask2Former, DPT, DETR, LLaVA and the like from configurations, with
    random weights. So that

        config = UperNetConfig(backbone_config=RadioBackboneConfig.from_pretrained(folder, out_indices=[3, 6, 9, 12]))
        model = load_student(UperNetForSemanticSegmentation(config), folder)

    starts from the student. A model that was saved is complete: open it with its own `from_pretrained`.

    Args:
        model: anything with a [`RadioBackbone`] or [`RadioVisionTower`] in it.
        student: folder or Hub id of a [`RadioModel`], or a model in memory. Adaptors, and blocks after a backbone's
            last feature map, are left out.

    Returns:
        `model`.

    Raises:
        OSError: there is no such student.
        ValueError: nothing of RADIO in `model`, its configuration is not the student's, or the student is damaged.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is {shown(model)}, expected a torch.nn.Module with a RADIO backbone or tower in it.")
    parts = [module for module in model.modules() if isinstance(module, RadioModel)]
    if not parts:
        raise ValueError(
            f"{type(model).__name__} has no RADIO backbone or vision tower; build it with "
            "backbone_config=RadioBackboneConfig.from_pretrained(student) or "
            "vision_config=RadioVisionTowerConfig.from_pretrained(student)."
        )
    if not isinstance(student, RadioModel):
        check_source("student", student)
        student = RadioModel.from_pretrained(student)
    weights = student.state_dict()
    for part in parts:
        needed = part.state_dict()
        wrong = [name for name in _SAME if getattr(part.config, name) != getattr(student.config, name)]
        wrong += [name for name in needed if name not in weights or needed[name].shape != weights[name].shape]
        if wrong:
            raise ValueError(
                f"The student does not fit {type(model).__name__}: {', '.join(wrong[:4])}{', ...' * (len(wrong) > 4)} "
                "differ; build it from the student's own configuration (from_pretrained(student))."
            )
        part.load_state_dict({name: weights[name] for name in needed})
    return model


def weight_state(model: RadioModel) -> tuple[int, int] | None:
    """Identifies the present values of the weights; None where there are no values yet, as in `from_pretrained`."""
    weight = model.embeddings.patch_projection.weight
    return None if weight.is_meta or weight.is_inference() else (id(weight), weight._version)


def warn_if_random(part) -> None:
    """At the first forward of a backbone or tower: a warning if its weights are still those it was built with."""
    if part.built_with is None or torch.compiler.is_compiling():
        return
    folder = part.config.name_or_path
    if folder and weight_state(part.model) == part.built_with:
        logger.warning(
            f"{type(part).__name__} was built from the configuration of {folder}, but its weights are random. Load "
            f"them with transformers_radio.load_student(model, {folder!r})."
        )
    part.built_with = None
