"""What training asks of the vision transformer besides its forward pass: crops of the position table and windows to
draw, decay, new heads."""

import copy
import math
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers.utils import logging

from .inputs_radio import check_size
from .student_radio import RadioStudentMixin

logger = logging.get_logger(__name__)

# log-uniform aspect ratio of a training crop of the position table
_CPE_RATIO = (3 / 4, 4 / 3)


def cpe_training_grid(
    batch: int, rows: int, cols: int, scale: list[float], device: torch.device | None = None
) -> torch.Tensor:
    """Sampling points of one random crop of the position table per image.

    Args:
        scale (`list[float]`): Smallest and largest area share of a crop. Its side is uniform between the roots.

    Returns:
        `torch.Tensor` of shape `(batch, rows, cols, 2)`: `(x, y)` in [-1, 1], for `grid_sample(align_corners=True)`.
        Drawn from the default generator of `device`.
    """
    draw = torch.rand(4, batch, 1, device=device)
    low, high = math.sqrt(scale[0]), math.sqrt(scale[1])
    side = low + (high - low) * draw[0]
    low, high = (math.log(ratio) for ratio in _CPE_RATIO)
    aspect = torch.exp(low + (high - low) * draw[1])
    width, height = (side * aspect).clamp(0, 1), (side / aspect).clamp(0, 1)
    left, top = (1 - width) * draw[2], (1 - height) * draw[3]
    x = left + width * torch.linspace(0, 1, cols, device=device)  # (B, cols)
    y = top + height * torch.linspace(0, 1, rows, device=device)  # (B, rows)
    # (B, cols) and (B, rows) -> (B, rows, cols, 2)
    grid = torch.stack([x[:, None, :].expand(-1, rows, -1), y[:, :, None].expand(-1, -1, cols)], dim=-1)
    return 2 * grid - 1


def is_checkpointed_reentrantly(layer: Any) -> bool:
    """Whether `layer` is computed again in the backward pass by torch's reentrant implementation."""
    options = getattr(getattr(layer, "_gradient_checkpointing_func", None), "keywords", {})
    return layer.gradient_checkpointing and options.get("use_reentrant", False) and torch.is_grad_enabled()


class RadioTrainingMixin(RadioStudentMixin):
    """What every student offers to training, for a model with CLS tokens, windows and `encoder.layer`."""

    encoder: Any
    summary_idxs: torch.Tensor

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks, in order."""
        return list(self.encoder.layer)

    def no_weight_decay(self) -> set[str]:
        """Tokens and the position table: inputs, not maps between spaces, which decay would pull to zero."""
        return {"embeddings.cls_register_token", "embeddings.position_embedding"}

    # ---------------------------------------------------------------- windows

    def _windows_to_draw(self, height: int, width: int) -> list[int]:
        """Sizes in `config.train_window_sizes` that divide the patch grid of such images and do not cover it whole."""
        rows, cols = self.grid(height, width)
        return [
            size
            for size in self.config.train_window_sizes or []
            if rows % size == 0 and cols % size == 0 and (size < rows or size < cols)
        ]

    def sample_window_size(self, height: int, width: int, generator: torch.Generator | None = None) -> int:
        """Draw the window of one training forward for images of `height` x `width` pixels.

        With probability `config.train_window_probability`, one of `config.train_window_sizes` that divides the patch
        grid and does not cover it whole; otherwise 0, attention without windows.

        Args:
            generator (`torch.Generator`, *optional*): On the CPU; equally seeded ones give all ranks the same
                windows. Missing: torch's default CPU generator, as in a forward without `window_size`.
        """
        check_size(height, width)
        sizes = self._windows_to_draw(height, width)
        draw, choice = torch.rand(2, generator=generator).tolist()
        return sizes[int(choice * len(sizes))] if sizes and draw < self.config.train_window_probability else 0

    def training_options(self, height: int, width: int, generator: torch.Generator | None = None) -> dict[str, Any]:
        """`{"window_size": n}` as `sample_window_size` draws it, with `config.train_window_sizes`; else `{}`."""
        if not self.config.train_window_sizes:
            return {}
        return {"window_size": self.sample_window_size(height, width, generator)}

    def training_warnings(self, sizes: list[tuple[int, int]]) -> list[str]:
        """Which of `config.train_window_sizes` are never drawn for images of these `(height, width)` in pixels.

        Raises:
            ValueError: None of them is ever drawn.
        """
        asked = list(dict.fromkeys(self.config.train_window_sizes or []))
        drawn = {window for size in sizes for window in self._windows_to_draw(*size)}
        sides = sorted({side for size in sizes for side in self.grid(*size)})
        if asked and not drawn:
            raise ValueError(
                f"train_window_sizes is {asked}, and none of them divides a grid of patches into several windows: the "
                f"grids have sides of {sides}; choose divisors of these, or None for no windows."
            )
        return [
            f"train_window_sizes: {window} is never drawn, as the grids have sides of {sides}"
            for window in asked
            if window not in drawn
        ]

    def attention_saving(self, height: int, width: int) -> float:
        """Share of the attention's FLOPs that drawn windows save on average, for images of this size in pixels.

        In W x W windows each of the N patches attends to W**2 patches instead of all N and the prefix tokens.
        """
        config, windows = self.config, self._windows_to_draw(height, width)
        if not windows:
            return 0.0
        rows, cols = self.grid(height, width)
        tokens = rows * cols + config.num_summary_tokens
        saved = [1 - rows * cols * window**2 / tokens**2 for window in windows]
        windowed_blocks = 1 - len(config.global_blocks) / config.num_hidden_layers
        return config.train_window_probability * windowed_blocks * sum(saved) / len(saved)

    # ---------------------------------------------------------------- new heads

    def with_new_adaptors(self, adaptors: dict[str, dict[str, Any]]) -> Any:
        """The same model with more adaptors, freshly initialized, behind its own; it shares the other weights.

        Each new summary head gets a CLS token, whatever its `summary_token` says: the one that all heads share, one
        that no head reads yet, or a new one behind the others that starts as a copy of the summary's first token.
        Which one is logged.

        Args:
            adaptors (`dict[str, dict]`): Entries of `config.adaptors`.

        Raises:
            ValueError: The model has an adaptor of this name, an entry is not valid, or weights are parametrized.
        """
        self._check_new(adaptors)
        config, old = copy.deepcopy(self.config), self.config
        entries = {name: dict(adaptor) for name, adaptor in adaptors.items()}
        if old.summary_type == "cls":
            config.num_cls_tokens, config.summary_idxs = _place_summaries(old, entries)
        config.adaptors = {**config.adaptors, **entries}
        with torch.device(self.device):
            model = type(self)(config)
        table = self.state_dict()["embeddings.cls_register_token"]  # (CLS tokens + registers, D)
        grown = {"summary_idxs": model.summary_idxs}
        if config.num_cls_tokens > old.num_cls_tokens:
            copies = table[old.summary_idxs[:1]].repeat(config.num_cls_tokens - old.num_cls_tokens, 1)
            tokens, registers = table[: old.num_cls_tokens], table[old.num_cls_tokens :]
            grown["embeddings.cls_register_token"] = torch.cat([tokens, copies, registers])
        return self._share_weights(model, **grown)


def _place_summaries(config: Any, entries: dict[str, dict[str, Any]]) -> tuple[int, list[int]]:
    """Gives each new summary its CLS token, in place; returns the number of CLS tokens and `summary_idxs`.

    Args:
        config: The model's [`RadioConfig`] as it is.
        entries: The new adaptors.
    """
    tokens, summary_idxs = config.num_cls_tokens, list(config.summary_idxs)
    read = [adaptor["summary_token"] for adaptor in config.adaptors.values() if adaptor["summary_dim"] is not None]
    free = [token for token in range(tokens) if token not in read]
    for name, entry in entries.items():
        if entry.get("summary_dim") is None:
            continue
        if len(read) > 1 and len(set(read)) == 1:  # a student with one token for all its teachers
            token, which = read[0], "which all summaries of this student share"
        elif free:
            token, which = free.pop(0), "which no other adaptor reads"
        else:
            token, which = tokens, f"which is new, a copy of token {summary_idxs[0]}"
            tokens += 1
        entry["summary_token"] = token
        grown = "" if token in summary_idxs else ", and the student's summary has it at its end"
        summary_idxs += [] if token in summary_idxs else [token]
        if not (dist.is_available() and dist.is_initialized() and dist.get_rank()):  # every process builds the model
            logger.warning(f"the summary of the new adaptor {name!r} is read from CLS token {token}, {which}{grown}")
    return tokens, summary_idxs
