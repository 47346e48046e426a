"""Checks of what a RADIO model is called with; all raise ValueError with the value and the fix."""

import math
from collections.abc import Mapping, Set
from typing import Any

import torch

from .errors_radio import shown
from .fields_radio import is_integer

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
FORMATS = ("NCHW", "NLC")  # of forward_intermediates
AGGREGATIONS = ("sparse", "dense")


def check_images(pixel_values: torch.Tensor, num_channels: int, step: int, weight: torch.Tensor):
    """Floats `(batch, num_channels, height, width)`, sides multiples of `step` pixels, for a model with `weight`."""
    check_floats(pixel_values, weight)
    if pixel_values.ndim != 4 or pixel_values.shape[1] != num_channels:
        raise ValueError(
            f"pixel_values has shape {tuple(pixel_values.shape)}, expected (batch, {num_channels}, height, width); "
            "add a batch axis, move the channels first, convert gray or RGBA images to RGB."
        )
    if pixel_values.shape[0] == 0:
        raise ValueError("pixel_values hold no image (batch size 0); leave empty batches out.")
    height, width = pixel_values.shape[-2:]
    if height % step or width % step or not height or not width:
        raise ValueError(
            f"pixel_values are {height}x{width} pixels, but sides must be multiples of {step}; resize to "
            f"{nearest_multiple(height, step)}x{nearest_multiple(width, step)} "
            "(see model.get_nearest_supported_resolution)."
        )


def check_packed(
    pixel_values: torch.Tensor, image_grid_hw: torch.Tensor, patch_dim: int, weight: torch.Tensor
) -> list[tuple[int, int]]:
    """Floats `(total patches, patch_dim)` that fit the grids `(images, 2)`; returns the grids."""
    check_floats(pixel_values, weight)
    check_tensor("image_grid_hw", image_grid_hw, "integers (images, 2)")
    if image_grid_hw.ndim != 2 or image_grid_hw.shape[1] != 2 or image_grid_hw.dtype not in _INTEGERS:
        raise ValueError(
            f"image_grid_hw has shape {tuple(image_grid_hw.shape)} and dtype {image_grid_hw.dtype}, expected integers "
            "(images, 2): rows and columns of patches of each image."
        )
    if image_grid_hw.shape[0] == 0:
        raise ValueError("image_grid_hw holds no image; leave empty batches out.")
    if image_grid_hw.device.type == "meta":
        raise ValueError("image_grid_hw is on the meta device, which holds no values; create it on the CPU.")
    grids = [(rows, cols) for rows, cols in image_grid_hw.tolist()]
    total = sum(rows * cols for rows, cols in grids)
    if tuple(pixel_values.shape) != (total, patch_dim) or any(side < 1 for grid in grids for side in grid):
        raise ValueError(
            f"packed pixel_values have shape {tuple(pixel_values.shape)}, but the grids {shown(grids)} need "
            f"({total}, {patch_dim}): all patches of all images, each flattened channel by channel."
        )
    return grids


def check_tensor(name: str, tensor: Any, expected: str):
    """A dense tensor; `expected` says what it should hold."""
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(
            f"{name} is a {type(tensor).__name__}, expected a torch.Tensor of {expected}; pass "
            f"torch.as_tensor({name})."
        )
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "nested" if tensor.is_nested else tensor.layout
        raise ValueError(f"{name} is a {kind} tensor, expected a dense one of {expected}; convert it or stack it.")


def check_floats(pixel_values: torch.Tensor, weight: torch.Tensor):
    """A dense tensor of floats, not on the meta device unless the model's `weight` is."""
    check_tensor("pixel_values", pixel_values, "floats in [0, 1]")
    if pixel_values.dtype not in _FLOATS:
        raise ValueError(
            f"pixel_values are {pixel_values.dtype}, expected float32, bfloat16, float16 or float64 in [0, 1]; for "
            "integers in [0, 255] divide by 255 (pixel_values / 255)."
        )
    if pixel_values.device.type == "meta" and weight.device.type != "meta":
        raise ValueError(
            "pixel_values are on the meta device, which holds no values; create them on the model's device."
        )


def check_outputs(output_hidden_states: Any, output_attentions: Any):
    """Both are flags; for hidden states, numbers of layers may be given instead."""
    layers = output_hidden_states if isinstance(output_hidden_states, (list, tuple)) else [output_hidden_states]
    if not all(layer is None or isinstance(layer, (bool, int)) for layer in layers):
        raise ValueError(
            f"output_hidden_states is {shown(output_hidden_states)}, expected True, False or None, or numbers of "
            "layers."
        )
    if output_attentions is not None and not isinstance(output_attentions, bool):
        raise ValueError(f"output_attentions is {shown(output_attentions)}, expected True, False or None.")


def check_layers(output_hidden_states: Any, count: int) -> set[int]:
    """Numbers of the chosen hidden states out of `count`: all for True; negative numbers count from the end."""
    if output_hidden_states is None or output_hidden_states is False:
        return set()
    if output_hidden_states is True:
        return set(range(count))
    layers = output_hidden_states if isinstance(output_hidden_states, (list, tuple)) else [output_hidden_states]
    if not all(is_integer(layer, -count, count - 1) for layer in layers):
        raise ValueError(
            f"output_hidden_states is {shown(output_hidden_states)}, expected True, False, or numbers of layers from "
            f"{-count} to {count - 1}: the embeddings and {count - 1} blocks."
        )
    return {layer % count for layer in layers}


def check_intermediates(indices: Any, count: int, output_fmt: Any, aggregation: Any) -> list[int]:
    """Numbers of the chosen blocks out of `count`, ascending, as timm counts them: all for None, the last n for n."""
    for name, value, known in (("output_fmt", output_fmt, FORMATS), ("aggregation", aggregation, AGGREGATIONS)):
        if value not in known:
            raise ValueError(f"{name} is {shown(value)}, expected {' or '.join(map(repr, known))}.")
    if indices is None:
        return list(range(count))
    if is_integer(indices, 1, count):
        return list(range(count - indices, count))
    if (
        not isinstance(indices, (list, tuple))
        or not indices
        or not all(is_integer(i, -count, count - 1) for i in indices)
    ):
        raise ValueError(
            f"indices is {shown(indices)}, expected None, the number of the last blocks to take (1 to {count}), or a "
            f"list of blocks from {-count} to {count - 1}."
        )
    return sorted({index % count for index in indices})


def check_window(window_size: int, rows: int, cols: int, patch_size: int):
    """A window side in patches, 0 for none, must divide the patch grid."""
    if not isinstance(window_size, int) or isinstance(window_size, bool) or window_size < 0:
        raise ValueError(
            f"window_size is {shown(window_size)}, expected a whole number of patches, or 0 for global attention."
        )
    if window_size and (rows % window_size or cols % window_size):
        height, width = (nearest_multiple(side, window_size) * patch_size for side in (rows, cols))
        raise ValueError(
            f"window_size {window_size} does not divide the {rows}x{cols} patch grid; resize the images to "
            f"{height}x{width} pixels, choose a divisor of both sides, or 0 for global attention."
        )


def check_adaptors(adaptors: list[str] | None, available: list[str]) -> list[str]:
    """The adaptors to run: all of them for `None`."""
    if adaptors is None:
        return available
    is_list = isinstance(adaptors, (list, tuple, Set, Mapping))
    names = list(adaptors) if is_list else []
    if not is_list or any(not isinstance(name, str) or name not in available for name in names):
        raise ValueError(f"adaptors is {shown(adaptors)}, expected a list out of {available}; None runs all, [] none.")
    return names


def check_mask(pixel_mask: Any, expected: tuple[int, ...]):
    """A dense tensor of real numbers or booleans, one for each pixel, not on the meta device."""
    check_tensor("pixel_mask", pixel_mask, "ones and zeros (batch, height, width)")
    if pixel_mask.shape != expected or pixel_mask.dtype not in (torch.bool, *_INTEGERS, *_FLOATS):
        raise ValueError(
            f"pixel_mask has shape {tuple(pixel_mask.shape)} and dtype {pixel_mask.dtype}, expected ones and zeros "
            f"{expected}: one value for each pixel of the images."
        )
    if pixel_mask.device.type == "meta":
        raise ValueError("pixel_mask is on the meta device, which holds no values; create it on that of the images.")


def check_size(height: Any, width: Any):
    """Two positive integers: sides in pixels."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # sizes are symbols there
        return
    if any(not isinstance(side, int) or isinstance(side, bool) or side < 1 for side in (height, width)):
        raise ValueError(
            f"height and width are {shown(height)} and {shown(width)}, expected positive integers: the image's "
            "sides in pixels."
        )


def check_labels(labels: Any, expected: str, weight: torch.Tensor):
    """A dense tensor of real numbers, not on the meta device unless the model's `weight` is."""
    check_tensor("labels", labels, expected)
    if labels.device.type == "meta" and weight.device.type != "meta":
        raise ValueError("labels are on the meta device, which holds no values; create them on the model's device.")
    if labels.dtype not in (*_INTEGERS, *_FLOATS, torch.bool):
        raise ValueError(f"labels are {labels.dtype}, expected {expected}; convert them, e.g. labels.long().")


def check_classes(labels: torch.Tensor, num_labels: int, ignore_index: int):
    """Integer labels, each one of `num_labels` classes counted from 0, or `ignore_index`."""
    wrong = ((labels < 0) | (labels >= num_labels)) & (labels != ignore_index)
    if wrong.any():
        found = labels[wrong].unique().tolist()
        raise ValueError(
            f"labels hold {', '.join(map(str, found[:5]))}{', ...' if len(found) > 5 else ''}, but num_labels is "
            f"{num_labels}: classes are 0 to {num_labels - 1}, and {ignore_index} is ignored. Map everything else to "
            f"{ignore_index}, or load the model with more num_labels."
        )


def in_function_transform() -> bool:
    """Whether a transform of `torch.func` (vmap, grad, jvp) runs: its tensors are stand-ins without values."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def returns_tensors_only() -> bool:
    """Whether an output must not hold anything else: in `torch.jit.trace` and in transforms of `torch.func`."""
    return not torch.compiler.is_compiling() and (torch.jit.is_tracing() or in_function_transform())


def can_read_values(tensor: torch.Tensor) -> bool:
    """Whether values can be read: not while compiling or tracing, in `torch.func`, or on the meta device."""
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not in_function_transform()
        and type(tensor) is torch.Tensor
        and not tensor.is_meta
        and tensor.numel() > 0
    )


def describe_range_error(pixel_values: torch.Tensor) -> str | None:
    """A warning if values are clearly outside [0, 1], with a margin, as resizing may overshoot; otherwise None."""
    low, high = (bound.item() for bound in pixel_values.detach().aminmax())
    if -0.5 <= low and high <= 1.5:
        return None
    if not (math.isfinite(low) and math.isfinite(high)):
        return "pixel_values hold NaN or infinite values but the model expects [0, 1]; check how they were computed."
    guess = (
        "they look like [0, 255]: divide by 255"
        if low >= 0
        else "they look normalized already: leave mean and std to the model, or call make_preprocessor_external()"
    )
    return f"pixel_values lie in [{low:.2f}, {high:.2f}] but the model expects [0, 1]; {guess}."


def nearest_multiple(value: int, step: int) -> int:
    """The multiple of `step` nearest to `value`, and at least one `step`."""
    return max(round(value / step), 1) * step
