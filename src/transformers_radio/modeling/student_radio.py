"""What every student of the family offers around its forward pass: one output, sizes, preprocessing."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.utils import ModelOutput, logging

from .adaptors_radio import AdaptorOutput
from .embeddings_radio import RadioExternalConditioner
from .inputs_radio import can_read_values, check_size, check_tensor, describe_range_error, nearest_multiple

logger = logging.get_logger(__name__)


@dataclass
class RadioModelOutput(ModelOutput):
    """Output of a student; for packed inputs the images' tokens follow each other, without a batch axis.

    Args:
        summary (`torch.Tensor` of shape `(batch, n_summary_idxs * hidden)`): The selected CLS tokens side by side, or
            `(batch, hidden)`, the average of the features, with `summary_type="mean"`.
        features (`torch.Tensor` of shape `(batch, h * w, hidden)`): Row-major patch tokens.
        last_hidden_state (`torch.Tensor` of shape `(batch, prefix + h * w, hidden)`): CLS, registers, patches.
        hidden_states (`tuple[torch.Tensor]`): The embeddings and each block's output, before a final norm.
        attentions (`tuple[torch.Tensor]`): Each block's probabilities `(batch, heads, length, length)`; of a
            windowed block `(batch * windows, heads, window length, window length)`.
        adaptors (`dict[str, AdaptorOutput]`): Per adaptor that ran, its `summary` and `features`.
        pooler_output (`torch.Tensor`): `summary`, by the name that transformers' pipelines look for.
    """

    summary: torch.Tensor | None = None
    features: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    adaptors: dict[str, AdaptorOutput] | None = None
    pooler_output: torch.Tensor | None = None


class RadioStudentMixin:
    """Sizes, feature grids and the input conditioner of a student with `config` and `input_conditioner`."""

    config: Any
    input_conditioner: nn.Module
    _range_checked = False

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return self.config.patch_size

    @property
    def min_resolution_step(self) -> int:
        """Image sides must be multiples of this many pixels (patch size, times the default window if there is one)."""
        return self.config.patch_size * (self.config.window_size or 1)

    @property
    def max_resolution(self) -> int:
        """Image side in pixels up to which the position table is not stretched; larger images do run."""
        return self.config.max_img_size

    @property
    def preferred_resolution(self) -> int:
        """Image side in pixels at which the model is best."""
        return self.config.preferred_resolution

    def get_nearest_supported_resolution(self, height: int, width: int) -> tuple[int, int]:
        """The nearest `(height, width)` in pixels that the model takes."""
        check_size(height, width)
        step = self.min_resolution_step
        return nearest_multiple(height, step), nearest_multiple(width, step)

    def features_to_grid(self, features: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """`(B, h*w, C)` features of images of `height` x `width` pixels -> `(B, C, h, w)`.

        Also takes adaptor features on a grid that is finer by an integer factor.

        Raises:
            ValueError: The number of features does not fit the image size.
        """
        check_tensor("features", features, "tokens (batch, h * w, channels)")
        check_size(height, width)
        if features.ndim != 3:
            raise ValueError(f"features have shape {tuple(features.shape)}, expected (batch, h * w, channels).")
        rows, cols = height // self.patch_size, width // self.patch_size
        is_patch_grid = features.shape[1] == rows * cols  # first, for compilers: they cannot trace isqrt
        factor = 1 if is_patch_grid else math.isqrt(features.shape[1] // max(rows * cols, 1))
        if features.shape[1] != rows * cols * factor**2 or factor == 0:
            raise ValueError(
                f"{features.shape[1]} features do not fit {height}x{width} pixels, which have {rows}x{cols} patches; "
                "pass the height and width of the images that the features come from."
            )
        # (B, h*w, C) -> (B, h, w, C) -> (B, C, h, w)
        return features.unflatten(1, (rows * factor, cols * factor)).permute(0, 3, 1, 2)

    def summary_and_patches(self, tokens: torch.Tensor) -> torch.Tensor:
        """`(B, prefix + h*w, hidden)` -> `(B, 1 + h*w, hidden)`: one summary token instead of the whole prefix.

        It is what models expect that know one class token. The summary token is the first selected CLS token, or the
        average of the patches with average pooling.
        """
        patches = tokens[:, self.config.num_summary_tokens :]
        if self.config.summary_type == "mean":
            summary = patches.mean(dim=1, keepdim=True)
        else:
            index = self.config.summary_idxs[0]
            summary = tokens[:, index : index + 1]
        return torch.cat([summary, patches], dim=1)

    def make_preprocessor_external(self) -> nn.Module:
        """Hand the input conditioner over, e.g. to a data pipeline: from now on `model(conditioner(pixel_values))`.

        This lasts as long as the object: the statistics stay in the state dict, so a saved checkpoint is complete
        and, loaded again, takes images in [0, 1].
        """
        if isinstance(self.input_conditioner, nn.Identity):
            raise ValueError("The input conditioner is external already; use the module that the first call returned.")
        conditioner = self.input_conditioner
        self.input_conditioner = RadioExternalConditioner(conditioner)
        return conditioner

    def _warn_about_range(self, pixel_values: torch.Tensor):
        if self._range_checked or isinstance(self.input_conditioner, nn.Identity) or not can_read_values(pixel_values):
            return
        error = describe_range_error(pixel_values)
        if error is not None:
            logger.warning(error)
        # reading values makes an accelerator wait, so there only the first batch is looked at
        self._range_checked = error is not None or pixel_values.device.type != "cpu"
