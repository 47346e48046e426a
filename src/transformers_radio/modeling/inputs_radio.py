"""Checks of what a RADIO model is called with; all raise ValueError with the value and the fix."""

import math

import torch


def check_images(pixel_values: torch.Tensor, num_channels: int, step: int):
    """Floats `(batch, num_channels, height, width)`, sides multiples of `step` pixels."""
    check_floats(pixel_values)
    if pixel_values.ndim != 4 or pixel_values.shape[1] != num_channels:
        raise ValueError(
            f"pixel_values has shape {tuple(pixel_values.shape)}, expected (batch, {num_channels}, height, width); "
            "add a batch axis, move the channels first, convert grey or RGBA images to RGB."
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


def check_packed(pixel_values: torch.Tensor, image_grid_hw: torch.Tensor, patch_dim: int) -> list[tuple[int, int]]:
    """Floats `(total patches, patch_dim)` that fit the grids `(images, 2)`; returns the grids."""
    check_floats(pixel_values)
    if not isinstance(image_grid_hw, torch.Tensor):
        raise ValueError(
            f"image_grid_hw is a {type(image_grid_hw).__name__}, expected a tensor of integers (images, 2): pass "
            "torch.tensor([[rows, columns], ...])."
        )
    if image_grid_hw.shape[0] == 0:
        raise ValueError("image_grid_hw holds no image; leave empty batches out.")
    if image_grid_hw.ndim != 2 or image_grid_hw.shape[1] != 2 or image_grid_hw.is_floating_point():
        raise ValueError(
            f"image_grid_hw has shape {tuple(image_grid_hw.shape)} and dtype {image_grid_hw.dtype}, expected integers "
            "(images, 2): rows and columns of patches of each image."
        )
    grids = [(rows, cols) for rows, cols in image_grid_hw.tolist()]
    total = sum(rows * cols for rows, cols in grids)
    if tuple(pixel_values.shape) != (total, patch_dim) or any(side < 1 for grid in grids for side in grid):
        raise ValueError(
            f"packed pixel_values have shape {tuple(pixel_values.shape)}, but the grids {grids} need "
            f"({total}, {patch_dim}): all patches of all images, each flattened channel by channel."
        )
    return grids


def check_floats(pixel_values: torch.Tensor):
    if not isinstance(pixel_values, torch.Tensor):
        raise ValueError(
            f"pixel_values is a {type(pixel_values).__name__}, expected a torch.Tensor; pass "
            "torch.as_tensor(pixel_values)."
        )
    if not pixel_values.is_floating_point():
        raise ValueError(
            f"pixel_values are {pixel_values.dtype}, expected floats in [0, 1]; for integers in [0, 255] divide by "
            "255 (pixel_values / 255)."
        )


def check_window(window_size: int, rows: int, cols: int, patch_size: int):
    """A window side in patches, 0 for none, must divide the patch grid."""
    if not isinstance(window_size, int) or window_size < 0:
        raise ValueError(
            f"window_size is {window_size!r}, expected a whole number of patches, or 0 for global attention."
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
    if isinstance(adaptors, str) or any(name not in available for name in adaptors):
        raise ValueError(f"adaptors is {adaptors!r}, expected a list out of {available}; None runs all, [] none.")
    return list(adaptors)


def check_classes(labels: torch.Tensor, num_labels: int, ignore_index: int):
    """Integer labels, each one of `num_labels` classes counted from 0, or `ignore_index`."""
    wrong = ((labels < 0) | (labels >= num_labels)) & (labels != ignore_index)
    if wrong.any():
        found = labels[wrong].unique().tolist()
        raise ValueError(
            f"labels hold {', '.join(map(str, found[:5]))}{', ...' if len(found) > 5 else ''}, but num_labels is "
            f"{num_labels}: classes are 0 to {num_labels - 1}, and {ignore_index} is ignored. Map what is no class to "
            f"{ignore_index}, or load the model with more num_labels."
        )


def in_function_transform() -> bool:
    """Whether a transform of `torch.func` (vmap, grad, jvp) runs: its tensors are stand-ins without values."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def can_read_values(tensor: torch.Tensor) -> bool:
    """Whether there are values to look at: not while compiling, tracing or in `torch.func`, not on the meta device."""
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not in_function_transform()
        and type(tensor) is torch.Tensor
        and not tensor.is_meta
        and tensor.numel() > 0
    )


def describe_range_error(pixel_values: torch.Tensor) -> str | None:
    """A sentence if values are plainly outside [0, 1]; resizing may overshoot a little, so there is a margin."""
    low, high = (bound.item() for bound in pixel_values.detach().aminmax())
    if -0.5 <= low and high <= 1.5:
        return None
    if not (math.isfinite(low) and math.isfinite(high)):
        return "pixel_values hold NaN or infinite values but the model expects [0, 1]; look at how they were made."
    guess = (
        "they look like [0, 255]: divide by 255"
        if low >= 0
        else "they look normalized already: leave mean and std to the model, or call make_preprocessor_external()"
    )
    return f"pixel_values lie in [{low:.2f}, {high:.2f}] but the model expects [0, 1]; {guess}."


def nearest_multiple(value: int, step: int) -> int:
    """The multiple of `step` nearest to `value`, and at least one `step`."""
    return max(round(value / step), 1) * step
