"""The contract of a frozen teacher: images in [0, 1] in, a summary and patch features out (paper section 3)."""

import hashlib
import importlib
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from transformers_radio.precision import DTYPES

if TYPE_CHECKING:
    from .text import TextEncoder

CALLS_PER_RANGE_CHECK = 1000  # on an accelerator, where reading values waits for all work before it
Normalization = tuple[Sequence[float], Sequence[float]]  # mean and std per RGB channel, for images in [0, 1]


@dataclass
class TeacherOutput:
    """What a student learns to predict; all float32.

    summary: (B, summary_dim), or None for a teacher without one (SAM).
    features: (B, h*w, feature_dim), row-major over the grid.
    grid: (h, w).
    """

    summary: torch.Tensor | None
    features: torch.Tensor
    grid: tuple[int, int]


class Teacher(nn.Module):
    """A frozen network that owns its normalization, input size and dtype.

    A subclass loads its network in `from_checkpoint`, describes it in `__init__` and runs it in `encode`; checks,
    normalization, `no_grad` and the return to float32 happen here. A network without weights, on the meta device, is
    described as well as any other: `plan` works so. The teacher never leaves eval mode, not even when `.train()` is
    called on its parent.

    Args:
        model: the network; frozen here.
        image_size: side of the square input in pixels.
        patch_size: pixels per feature along a side.
        summary_dim: width of the summary, or None for a teacher without one.
        feature_dim: width of a patch feature.
        normalization: (mean, std), each three numbers per RGB channel, for images in [0, 1].

    Attributes:
        has_text: whether `text_encoder` gives a text tower. It belongs to the class, so it is known without weights.

    Raises:
        ValueError: for a mean or std of other than three numbers.
    """

    has_text = False

    def __init__(
        self,
        model: nn.Module,
        *,
        image_size: int,
        patch_size: int,
        summary_dim: int | None,
        feature_dim: int,
        normalization: Normalization,
    ):
        super().__init__()
        for name, values, smallest in zip(("mean", "std"), normalization, (-math.inf, 0.0), strict=True):
            if isinstance(values, str) or len(values) != 3 or not all(smallest < value < math.inf for value in values):
                raise ValueError(f"{name} is {values!r}, expected a {'positive ' * (name == 'std')}number per channel")
        mean, std = (torch.tensor(values, dtype=torch.float32).view(1, 3, 1, 1) for values in normalization)
        self._calls = 0
        self.model: Any = model.requires_grad_(False)
        self.image_size = image_size
        self.patch_size = patch_size
        self.summary_dim = summary_dim
        self.feature_dim = feature_dim
        self.mean: torch.Tensor
        self.std: torch.Tensor
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        self.eval()

    @classmethod
    def from_checkpoint(cls, checkpoint: str, image_size: int | None = None, dtype: str = "float32") -> "Teacher":
        """The teacher with its weights, on the CPU; a subclass may take options of its own behind these arguments.

        Args:
            checkpoint: Hub id, local path or whatever else the subclass documents.
            image_size: side of the square input in pixels; None for the checkpoint's own.
            dtype: of weights and activations: "float32", "bfloat16" or "float16".
        """
        raise NotImplementedError(f"{cls.__name__} must implement from_checkpoint(checkpoint, image_size, dtype)")

    @classmethod
    def text_encoder(cls, checkpoint: str) -> "TextEncoder | None":
        """The text tower of a checkpoint, in whose space its image summaries are; None without `has_text`."""
        return None

    @property
    def dtype(self) -> torch.dtype:
        """What the network computes in: the dtype of its weights."""
        return next((weight.dtype for weight in self.model.parameters()), torch.float32)

    def cast(self, dtype: str) -> "Teacher":
        """Converts the network's weights to "float32", "bfloat16" or "float16". Mean and std stay float32.

        Raises:
            ValueError: for an unknown dtype.
        """
        self.model.to(torch_dtype(dtype))
        return self

    def train(self, mode: bool = True) -> "Teacher":
        """Stays in eval mode: a teacher's dropout and batch statistics must not move with the student's mode."""
        return super().train(False)

    def encode(self, pixel_values: torch.Tensor) -> TeacherOutput:
        """Normalized (B, 3, image_size, image_size) in the teacher's dtype -> outputs in any dtype."""
        raise NotImplementedError(f"{type(self).__name__} must implement encode(pixel_values) -> TeacherOutput")

    def forward(self, images: torch.Tensor) -> TeacherOutput:
        """Targets for a batch of images.

        Args:
            images: floating point (B, 3, image_size, image_size), RGB in [0, 1].

        Raises:
            ValueError: for another shape, dtype or value range.
            RuntimeError: when `encode` breaks what the teacher promises (widths, grid).
        """
        self._check_images(images)
        # A training loop's autocast must not change the targets: the teacher computes in its own dtype.
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            pixel_values = (images.float() - self.mean.float()) / self.std.float()
            output = self.encode(pixel_values.to(self.dtype))
        self._check_output(output, len(images))
        summary = None if output.summary is None else output.summary.float()
        return TeacherOutput(summary, output.features.float(), output.grid)

    def _check_images(self, images: torch.Tensor) -> None:
        size = self.image_size
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"images have shape {tuple(images.shape)}, but this teacher takes RGB batches (B, 3, {size}, {size})"
            )
        if images.shape[2:] != (size, size):
            raise ValueError(
                f"images are {images.shape[2]}x{images.shape[3]}, but this teacher's image_size is {size}: resize "
                f"them to {size}x{size}, or build the teacher with another image_size"
            )
        if not images.is_floating_point():
            raise ValueError(f"images are {images.dtype}, but must be floating point in [0, 1]: divide uint8 by 255")
        if self._wants_range_check(images):
            low, high = (value.item() for value in images.aminmax())
            if not (low >= -1e-3 and high <= 1 + 1e-3):  # written so that NaN fails; the slack allows rounding
                raise ValueError(
                    f"images span [{low:.4g}, {high:.4g}], but must lie in [0, 1]: the teacher normalizes them itself"
                )

    def _wants_range_check(self, images: torch.Tensor) -> bool:
        """Always on a CPU. On an accelerator, which has to be waited for, on the first calls and then now and then."""
        self._calls += 1
        is_due = images.device.type == "cpu" or self._calls <= 4 or self._calls % CALLS_PER_RANGE_CHECK == 0
        return is_due and images.numel() > 0 and not images.is_meta

    def _check_output(self, output: TeacherOutput, batch: int) -> None:
        h, w = output.grid
        summary_shape = None if output.summary is None else tuple(output.summary.shape)
        expected_summary = None if self.summary_dim is None else (batch, self.summary_dim)
        if summary_shape != expected_summary or output.features.shape != (batch, h * w, self.feature_dim):
            raise RuntimeError(
                f"{type(self).__name__}.encode returned summary {summary_shape} and features "
                f"{tuple(output.features.shape)} for grid {output.grid}, but promised summary {expected_summary} and "
                f"features {(batch, h * w, self.feature_dim)}"
            )


def grid_of(tokens: torch.Tensor) -> tuple[int, int]:
    """Grid (h, w) of the patch tokens (B, h*w, C) of a square image."""
    side = round(tokens.shape[1] ** 0.5)
    return side, side


def flatten_grid(feature_map: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
    """(B, C, h, w) -> row-major (B, h*w, C) and (h, w)."""
    h, w = feature_map.shape[2:]
    return feature_map.flatten(2).transpose(1, 2), (h, w)


def resolve_image_size(image_size: int | None, native: int, patch_size: int) -> int:
    """The input side to use: `native` when None.

    Raises:
        ValueError: when a size other than the native one is not a positive multiple of the patch size.
    """
    if image_size is None or image_size == native:
        return native
    if image_size < patch_size or image_size % patch_size:
        nearest = max(1, round(image_size / patch_size)) * patch_size
        raise ValueError(
            f"image_size={image_size} is no positive multiple of this teacher's patch size {patch_size}: use {nearest}"
            f", or None for its native {native}"
        )
    return image_size


def torch_dtype(dtype: str) -> torch.dtype:
    """torch's dtype of this name.

    Raises:
        ValueError: for any other than "float32", "bfloat16" and "float16".
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is unknown: use one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def require(library: str) -> Any:
    """Imports a library that only some teachers need.

    Raises:
        ImportError: that names the pip extra, when the library is absent.
    """
    try:
        return importlib.import_module(library)
    except ModuleNotFoundError as error:
        raise ImportError(
            f'this teacher needs {error.name}, which is not installed: pip install "transformers_radio[teachers]"'
        ) from error


def check_options(owner: str, factory: Callable[..., Any], options: dict[str, Any]) -> None:
    """Raises a ValueError that lists the known options if `factory` does not take one of `options`."""
    known = [
        name for name in inspect.signature(factory).parameters if name not in ("checkpoint", "image_size", "dtype")
    ]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise ValueError(
            f"{owner} does not know {', '.join(map(repr, unknown))}: its options are {', '.join(known) or '(none)'}"
        )


def digest_weights(*modules: nn.Module) -> str:
    """A hash of all parameters and buffers, names and dtypes included. If they are sharded, all ranks must call it."""
    digest = hashlib.blake2b(digest_size=16)
    for module in modules:
        for name, tensor in module.state_dict().items():
            if isinstance(tensor, DTensor):
                tensor = tensor.full_tensor()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
