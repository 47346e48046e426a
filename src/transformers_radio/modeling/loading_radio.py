"""A student's weights in the backbone or vision tower of a larger model, such as UperNet, DPT or LLaVA."""

from typing import Any

from torch import nn

from .errors_radio import check_source, shown
from .student_radio import RadioStudentMixin

# fields that change the features, but not the shape of any weight; windows of a RADIO are an option of every forward
_SAME = ("num_attention_heads", "num_cls_tokens", "num_registers", "hidden_act", "layer_norm_eps")
_SAME_IN_ERADIO = ("num_heads", "window_size", "max_window_size", "layer_norm_eps")


def load_student(model: nn.Module, student: Any) -> nn.Module:
    """Put a student's weights into the RADIO backbone or vision tower inside `model`, in place.

    transformers builds the parts of UperNet, Mask2Former, DPT, DETR, LLaVA and similar models from configurations,
    with random weights. This model starts from the student:

        config = UperNetConfig(backbone_config=RadioBackboneConfig.from_pretrained(folder, out_indices=[3, 6, 9, 12]))
        model = load_student(UperNetForSemanticSegmentation(config), folder)

    A saved model is complete: open it with its own `from_pretrained`.

    Args:
        model: anything with a [`RadioBackbone`] or [`RadioVisionTower`] in it.
        student: folder or Hub id of a student, or a student in memory. Its adaptors, and blocks after a backbone's
            last feature map, are left out.

    Returns:
        `model`.

    Raises:
        OSError: there is no such student.
        ValueError: there is no RADIO part in `model`, its configuration is not the student's, or the student is
            damaged.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is {shown(model)}, expected a torch.nn.Module with a RADIO backbone or tower in it.")
    parts: list[Any] = [module for module in model.modules() if isinstance(module, RadioStudentMixin)]
    if not parts:
        raise ValueError(
            f"{type(model).__name__} has no RADIO backbone or vision tower; build it with "
            "backbone_config=RadioBackboneConfig.from_pretrained(student) or "
            "vision_config=RadioVisionTowerConfig.from_pretrained(student)."
        )
    if not isinstance(student, RadioStudentMixin):
        check_source("student", student)
        student = type(parts[0]).from_pretrained(student)
    weights = student.state_dict()
    for part in parts:
        needed = part.state_dict()
        same = _SAME_IN_ERADIO if hasattr(part.config, "num_heads") else _SAME
        wrong = [name for name in same if getattr(part.config, name, None) != getattr(student.config, name, None)]
        wrong += [name for name in needed if name not in weights or needed[name].shape != weights[name].shape]
        if wrong:
            raise ValueError(
                f"The student does not fit {type(model).__name__}: {', '.join(wrong[:4])}{', ...' * (len(wrong) > 4)} "
                "differ; build it from the student's own configuration (from_pretrained(student))."
            )
        part.load_state_dict({name: weights[name] for name in needed})
    return model
