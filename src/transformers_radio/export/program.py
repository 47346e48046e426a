"""A student as the function that is exported: images in, a flat dictionary of tensors out."""

from typing import Any

import torch
from torch import nn

from transformers_radio.evaluation.models.encoder import load_student


def open_student(folder: str, adaptors: list[str] | None, window_size: int | None) -> Any:
    """A student in float32 and evaluation mode, with these adaptors (all for None) and attention windows.

    Args:
        folder: Of a student, or of a release, which is converted in memory; or a Hub id.
        window_size: As `config.window_size`, which it replaces; None leaves it.

    Raises:
        OSError: There is no such folder or model.
        ValueError: Not a student, an unknown adaptor, or a window where the student has none.
    """
    model = load_student(folder).eval()
    model_type = model.config.model_type
    if adaptors is not None:
        model = model.with_adaptors(adaptors)
    if window_size is not None:
        if not hasattr(model.config, "window_size"):
            raise ValueError(f"window_size is {window_size}, but students of type {model_type} have no windows.")
        model.config.window_size = window_size or None
        model.config.validate()
        if window_size and 2 * unit_of(model) > model.max_resolution:
            raise ValueError(
                f"window_size is {window_size}: two windows are {2 * unit_of(model)} pixels, and the student's "
                f"largest image has {model.max_resolution}."
            )
    return model


class Program(nn.Module):
    """`pixel_values (B, C, H, W)`, float32 in [0, 1] -> float32 tensors by name, whatever the student's precision.

    `summary`, `features`, and `NAME_summary`, `NAME_features` of each adaptor.
    """

    def __init__(self, student: Any):
        super().__init__()
        # transformers' exporters cast the images to the dtype of the first parameter; the student may be in half
        self.dtype_of_images = nn.Parameter(torch.zeros(0), requires_grad=False)
        self.student = student
        self.config = student.config

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        output = self.student(pixel_values)
        found = {"summary": output.summary, "features": output.features}
        for name, head in output.adaptors.items():
            found |= {f"{name}_summary": head.summary, f"{name}_features": head.features}
        return {name: tensor.float() for name, tensor in found.items() if tensor is not None}


def unit_of(student: Any) -> int:
    """Sides of images are multiples of this many pixels: the student's step, its windows, or its only size."""
    if student.config.model_type == "eradio":
        if has_one_size(student):
            return student.get_nearest_supported_resolution(*2 * [student.preferred_resolution])[0]
        return student.min_resolution_step * student.config.window_size
    return student.min_resolution_step


def has_one_size(student: Any) -> bool:
    """Whether the program takes squares of one size.

    That is so for networks of timm that are built for one (other students have a field of this name too), and for an
    E-RADIO that chooses its windows by the image, which a program cannot.
    """
    if student.config.model_type == "eradio":
        return student.config.window_size is None
    return student.config.model_type == "radio_timm" and student.config.image_size is not None


def example_images(student: Any) -> torch.Tensor:
    """Images to trace with, `(2, C, H, W)`: a batch or side of 1, or a square, would be taken for the only one."""
    unit, channels = unit_of(student), student.config.num_channels
    if has_one_size(student):
        return torch.rand(2, channels, unit, unit)
    steps = max(1, -(-64 // unit))  # at least 128 x 192 pixels
    return torch.rand(2, channels, 2 * steps * unit, 3 * steps * unit)


def dynamic_shapes(student: Any) -> dict[str, dict[int, Any]]:
    """The free axes of `pixel_values`: the batch and, unless the program has one size, both sides."""
    axes = (0,) if has_one_size(student) else (0, 2, 3)
    return {"pixel_values": dict.fromkeys(axes, torch.export.Dim.AUTO)}


def has_free_squares(student: Any) -> bool:
    """Whether an ExecuTorch program takes squares of several sides: only the ViT's was tried."""
    return student.config.model_type == "radio" and executorch_steps(student) > 2


def executorch_steps(student: Any) -> int:
    """The side of the largest square, about the preferred resolution, in units."""
    return next(iter(parity_sizes(student).values()))[1] // unit_of(student)


def square_shapes(student: Any) -> dict[str, dict[int, Any]] | None:
    """The free axes for ExecuTorch: both sides together, up to about the preferred resolution; None for none."""
    if not has_free_squares(student):
        return None
    side = unit_of(student) * torch.export.Dim("side", min=2, max=executorch_steps(student))
    return {"pixel_values": {2: side, 3: side}}


def executorch_sizes(student: Any) -> dict[str, tuple[int, int, int]]:
    """As `parity_sizes`, for an ExecuTorch program: one image, square where several sides are free."""
    _, height, width = next(iter(parity_sizes(student).values()))
    sizes = {"large": (1, height, width)}
    if has_free_squares(student):
        unit, steps = unit_of(student), executorch_steps(student)
        medium = max(2, steps * 2 // 3) * unit
        sizes |= {"medium": (1, medium, medium), "small": (1, 2 * unit, 2 * unit)}
    return sizes


def parity_sizes(student: Any) -> dict[str, tuple[int, int, int]]:
    """Name -> batch, height and width in pixels of the images that a program is compared on.

    Three resolutions, and a square, an upright and a lying image.
    """
    unit = unit_of(student)
    if has_one_size(student):
        return {"single": (1, unit, unit), "batch": (3, unit, unit)}
    # about the preferred resolution, half of it, and half as much again, which is at most the largest
    steps = max(2, min(round(student.preferred_resolution / unit), student.max_resolution // unit * 2 // 3))
    half = max(2, steps // 2)
    in_steps = {
        "square": (1, steps, steps),
        "portrait": (2, half + max(1, half // 2), half),
        "landscape": (3, steps, steps + max(1, steps // 2)),
    }
    return {name: (batch, rows * unit, cols * unit) for name, (batch, rows, cols) in in_steps.items()}
