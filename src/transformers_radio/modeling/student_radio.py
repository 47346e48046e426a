"""The contract of every student: one output, sizes and grids, input conditioner, heads, and what training asks for."""

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.utils import ModelOutput, logging

from .adaptors_radio import AdaptorOutput, RadioAdaptorLayerScale
from .errors_radio import shown
from .inputs_radio import (
    can_read_values,
    check_adaptors,
    check_images,
    check_intermediates,
    check_size,
    check_tensor,
    describe_range_error,
    nearest_multiple,
)
from .linear_radio import check_merged, pack_linears

logger = logging.get_logger(__name__)


@dataclass
class RadioModelOutput(ModelOutput):
    """Output of a student. With packed inputs the tokens of all images follow each other, without a batch axis.

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
        grid (`tuple[int, int]`): `(h, w)` of `features`. None for packed images, and where a function may return
            tensors only (`torch.jit.trace`, `torch.func`).
    """

    summary: torch.Tensor | None = None
    features: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    adaptors: dict[str, AdaptorOutput] | None = None
    pooler_output: torch.Tensor | None = None
    grid: tuple[int, int] | None = None


class RadioInputConditioner(nn.Module):
    """`(pixels - mean) / std` per channel; in float32, the result in the dtype of the pixels.

    The statistics stay in float32 when the model is cast: half precision would round them.
    """

    def __init__(self, config):
        super().__init__()
        # (3,) -> (3, 1, 1)
        self.norm_mean = nn.Buffer(torch.tensor(config.norm_mean, dtype=torch.float32).view(-1, 1, 1))
        self.norm_std = nn.Buffer(torch.tensor(config.norm_std, dtype=torch.float32).view(-1, 1, 1))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        normalized = (pixel_values.float() - self.norm_mean.float()) / self.norm_std.float()
        return normalized.to(pixel_values.dtype)

    def _apply(self, fn, recurse=True):
        exact = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, statistic in exact.items():
            moved = getattr(self, name)
            if moved.dtype != statistic.dtype:  # a cast: take over the device only
                setattr(self, name, statistic.to(moved.device))
        return self


class RadioExternalConditioner(RadioInputConditioner, nn.Identity):
    """Replaces a conditioner that was handed over: keeps its statistics for the state dict and changes no pixel."""

    def __init__(self, conditioner: nn.Module):
        nn.Module.__init__(self)
        for name, statistic in conditioner.named_buffers():
            self.register_buffer(name, statistic.clone())

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return pixel_values


def init_shared_part(module: nn.Module, config: Any) -> bool:
    """Initializes a part that all students have besides backbone and Linears; False if `module` is another part."""
    if isinstance(module, RadioInputConditioner):
        for statistic, values in ((module.norm_mean, config.norm_mean), (module.norm_std, config.norm_std)):
            init.copy_(statistic, torch.tensor(values, dtype=torch.float32).view(-1, 1, 1))  # (C,) -> (C, 1, 1)
        return True
    if isinstance(module, RadioAdaptorLayerScale):
        init.constant_(module.gamma, 1e-5)
        return True
    return False


def _mean_tensor(tensors: tuple[Any, ...]) -> Any:
    """The mean of tensors, or None of Nones."""
    if tensors[0] is None:
        return None
    total = tensors[0]
    for tensor in tensors[1:]:  # one by one: a stack would hold all of them twice
        total = total + tensor
    return total / len(tensors)


class RadioStudentMixin(nn.Module):
    """First base of every student, a `PreTrainedModel` whose `forward` returns a [`RadioModelOutput`].

    A student has an `input_conditioner` (a [`RadioInputConditioner`]) and `adaptors`, an `nn.ModuleDict` with one
    [`RadioAdaptor`] per entry of `config.adaptors`. Its `config` has `adaptors`, `num_channels`, `patch_size` (the
    stride of the features in pixels), `hidden_size` (their width), `max_img_size` and `preferred_resolution`, and a
    classmethod `for_training` as [`RadioConfig`] has. What is defined here holds for a backbone with a stride and a
    pooled summary; one with more to it (class tokens, windows, blocks) overrides the members concerned.
    """

    config: Any
    device: torch.device
    dtype: torch.dtype
    input_conditioner: nn.Module
    adaptors: nn.ModuleDict
    is_fused = False  # by `fuse`
    _range_checked = False

    # ---------------------------------------------------------------- sizes

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels: the stride of the features."""
        return self.config.patch_size

    @property
    def min_resolution_step(self) -> int:
        """Image sides must be multiples of this many pixels."""
        return self.patch_size

    @property
    def max_resolution(self) -> int:
        """Image side in pixels up to which the model was made; larger images may run, as [`RadioModel`]'s do."""
        return self.config.max_img_size

    @property
    def preferred_resolution(self) -> int:
        """Image side in pixels at which the model is best."""
        return self.config.preferred_resolution

    @property
    def summary_dim(self) -> int:
        """Width of `RadioModelOutput.summary`."""
        return self.config.hidden_size

    @property
    def feature_dim(self) -> int:
        """Width of `RadioModelOutput.features`."""
        return self.config.hidden_size

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the features of images of `height` x `width` pixels, before any `upsample_factor`."""
        return height // self.patch_size, width // self.patch_size

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
        rows, cols = self.grid(height, width)
        is_patch_grid = features.shape[1] == rows * cols  # first, for compilers: they cannot trace isqrt
        factor = 1 if is_patch_grid else math.isqrt(features.shape[1] // max(rows * cols, 1))
        if features.shape[1] != rows * cols * factor**2 or factor == 0:
            raise ValueError(
                f"{features.shape[1]} features do not fit {height}x{width} pixels, which have {rows}x{cols} patches; "
                "pass the height and width of the images that the features come from."
            )
        # (B, h*w, C) -> (B, h, w, C) -> (B, C, h, w)
        return features.unflatten(1, (rows * factor, cols * factor)).permute(0, 3, 1, 2)

    def check_images(self, pixel_values: torch.Tensor):
        """Raises ValueError unless `forward` takes these images: floats `(batch, channels, height, width)`."""
        check_images(pixel_values, self.config.num_channels, self.patch_size, next(self.parameters()))

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
        # in this order: a compiled model that had read the flag would be compiled again once an eager call has set it
        if not can_read_values(pixel_values) or self._range_checked or isinstance(self.input_conditioner, nn.Identity):
            return
        error = describe_range_error(pixel_values)
        if error is not None:
            logger.warning(error)
        # reading values makes an accelerator wait, so there only the first batch is looked at
        self._range_checked = error is not None or pixel_values.device.type != "cpu"

    @torch.inference_mode(False)  # whose tensors know no gradients
    @torch.no_grad()
    def fuse(self) -> Any:
        """Joins weights that inference can apply in one go, in place; returns the model. Outputs agree to rounding.

        The query, key and value projections become one, layer scales and batch norms join the layer beside them. On a
        CPU with AVX-512, large Linears also keep a second copy of their weights, in the processor's order; copies of
        the model do not. A fused model can be neither trained nor saved: its configuration no longer describes its
        weights.

        Raises:
            ValueError: The model is in training mode, or has PEFT adapters or parametrizations.
        """
        if self.training:
            raise ValueError("The model is in training mode; call model.eval() before model.fuse().")
        if not self.is_fused:
            check_merged(self)
            self._fuse_parts()
            self.is_fused = True
            self.eval()  # also the new layers
        pack_linears(self)
        return self

    def _fuse_parts(self):
        for part in self.modules():
            if hasattr(part, "_fuse"):
                part._fuse()

    def train(self, mode: bool = True):
        if mode and self.is_fused:
            raise ValueError("The model is fused, for inference; load it again to train it.")
        return super().train(mode)

    # ---------------------------------------------------------------- heads

    def with_adaptors(self, names: list[str]) -> Any:
        """The same model with these adaptors only, in this order; it shares every weight with `self`.

        It also takes over training mode, attention implementation, an external conditioner, and which weights are
        frozen; freezing weights of one of the two models later leaves the other as it is.

        Raises:
            ValueError: A name that is not an adaptor of this model, or weights that are parametrized.
        """
        self._check_not_fused()
        names = check_adaptors(names, list(self.adaptors))
        config = copy.deepcopy(self.config)
        config.adaptors = {name: config.adaptors[name] for name in names}
        with torch.device("meta"):
            model = type(self)(config)
        return self._share_weights(model)

    def with_new_adaptors(self, adaptors: dict[str, dict[str, Any]]) -> Any:
        """The same model with more adaptors, freshly initialized, behind its own; it shares the other weights.

        Args:
            adaptors (`dict[str, dict]`): Entries of `config.adaptors`.

        Raises:
            ValueError: The model has an adaptor of this name, an entry is not valid, or weights are parametrized.
        """
        self._check_new(adaptors)
        config = copy.deepcopy(self.config)
        config.adaptors = {**config.adaptors, **adaptors}
        with torch.device(self.device):
            model = type(self)(config)
        return self._share_weights(model)

    def _check_new(self, adaptors: dict[str, dict[str, Any]]):
        self._check_not_fused()
        for name in adaptors:
            if name in self.adaptors:
                raise ValueError(f"This model has an adaptor {shown(name)}; give the new one another name.")

    def _check_not_fused(self):
        if self.is_fused:
            raise ValueError("The model is fused: choose its heads before model.fuse().")

    def _share_weights(self, model: Any, **grown: torch.Tensor) -> Any:
        """`model` with the weights of `grown` and of `self`, by name, and in the state of `self`."""
        mine = {**self.state_dict(), **grown}
        wanted = model.state_dict()
        new_heads = tuple(f"adaptors.{name}." for name in model.adaptors if name not in self.adaptors)
        lost = [name for name in wanted if name not in mine and not name.startswith(new_heads)]
        if lost:  # it would be random
            raise ValueError(
                f"This model has {lost[0]} under another name: choose its heads before its weights are parametrized."
            )
        weights = {name: mine[name] if name in mine else new.to(dtype=self.dtype) for name, new in wanted.items()}
        model.load_state_dict(weights, assign=True)  # no copies: a state dict holds the memory of the weights
        for name, parameter in self.named_parameters():
            if name in wanted:
                model.get_parameter(name).requires_grad_(parameter.requires_grad)
        if isinstance(self.input_conditioner, nn.Identity):
            model.make_preprocessor_external()
        return model.train(self.training)

    def summary_and_patches(self, tokens: torch.Tensor) -> torch.Tensor:
        """`(B, h*w, hidden)` -> `(B, 1 + h*w, hidden)`: one summary token, here the mean, in front of the features.

        Models that know one class token expect this.
        """
        return torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)

    # ---------------------------------------------------------------- intermediate features

    def forward_intermediates(
        self,
        pixel_values: torch.Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        aggregation: str = "sparse",
    ) -> Any:
        """The maps of some blocks, as timm's method of this name returns them. Runs no adaptors.

        Blocks are those of a vision transformer, and the stages of a network that has stages; with
        `output_hidden_states`, block i is `hidden_states[i + 1]` (of a timm student `hidden_states[i]`).

        Args:
            pixel_values (`torch.Tensor` of shape `(batch, channels, height, width)`): Images as in `forward`.
            indices (`int` or `list[int]`, *optional*): Blocks from 0, negative numbers from the end; the last n for a
                number n; all when missing. The maps come in the order of the blocks.
            return_prefix_tokens (`bool`): Return pairs `(map, prefix)` where the model has CLS and register tokens,
                `(batch, prefix, hidden)`.
            norm (`bool`): Apply the final norm to every map; of a network with stages, to its last map alone. Without
                effect where the model has none.
            stop_early (`bool`): Do not compute the blocks behind the last wanted one.
            output_fmt (`str`): "NCHW" for maps `(batch, hidden, h, w)`, "NLC" for `(batch, h * w, hidden)`.
            intermediates_only (`bool`): Return the list alone.
            aggregation (`str`): "sparse" returns the maps of the given blocks. "dense" returns, for each index, the
                mean of the maps of all blocks since the previous index (exclusive; since block 0 for the first) up to
                this index (inclusive). Prefix tokens are averaged likewise; with `norm`, after it.

        Returns:
            `(last, maps)`, or `maps` with `intermediates_only`. `last` is the `last_hidden_state` of `forward`; with
            `stop_early`, what it would be if the last wanted block were the model's last.

        Raises:
            ValueError: An image that `forward` refuses, an unknown block, format or aggregation, "dense" for maps of
                different sizes, or a model without intermediate maps.
        """
        if not self.num_intermediates:
            raise ValueError(f"{type(self).__name__} has no intermediate maps; its features are forward's.")
        chosen = check_intermediates(indices, self.num_intermediates, output_fmt, aggregation)
        wanted = list(range(chosen[-1] + 1)) if aggregation == "dense" else chosen
        self.check_images(pixel_values)
        self._warn_about_range(pixel_values)
        last, found = self._intermediates(pixel_values, wanted, chosen[-1] + 1 if stop_early else None, norm)
        if aggregation == "dense":
            found = self._averaged(found, chosen)
        maps: list[Any] = [pixels for pixels, _ in found]
        if output_fmt == "NLC":
            maps = [pixels.flatten(2).transpose(1, 2) for pixels in maps]  # (B, D, h, w) -> (B, h*w, D)
        if return_prefix_tokens and found[0][1] is not None:
            maps = [(pixels, prefix) for pixels, (_, prefix) in zip(maps, found, strict=True)]
        return maps if intermediates_only else (last, maps)

    def _averaged(self, found: list[tuple[Any, Any]], chosen: list[int]) -> list[tuple[Any, Any]]:
        """Maps and prefixes of all blocks up to the last chosen one -> their means up to each chosen one."""
        if len({pixels.shape for pixels, _ in found}) > 1:
            raise ValueError(
                f"aggregation='dense' averages maps, but those of {type(self).__name__} differ in size "
                f"({', '.join('x'.join(map(str, pixels.shape[1:])) for pixels, _ in found)}); use 'sparse'."
            )
        starts = [0, *(index + 1 for index in chosen[:-1])]
        groups = [found[start : end + 1] for start, end in zip(starts, chosen, strict=True)]
        return [
            (_mean_tensor(pixels), _mean_tensor(prefixes))
            for pixels, prefixes in (zip(*group, strict=True) for group in groups)
        ]

    @property
    def num_intermediates(self) -> int:
        """Number of maps that `forward_intermediates` chooses among; 0 for a model without."""
        return 0

    def _intermediates(
        self, pixel_values: torch.Tensor, wanted: list[int], stop: int | None, norm: bool
    ) -> tuple[torch.Tensor, list[tuple[Any, Any]]]:
        """What `forward_intermediates` arranges, of images that were checked.

        Args:
            wanted: Numbers of blocks, ascending.
            stop: Compute this many blocks; all for None.

        Returns:
            The last tokens, and for each wanted block its map `(B, D, h, w)` and its prefix, `(B, prefix, D)` or None.
        """
        raise NotImplementedError(f"{type(self).__name__} has num_intermediates, but no _intermediates.")

    # ---------------------------------------------------------------- training

    @property
    def blocks(self) -> list[nn.Module]:
        """The repeated blocks with nearly all of the weights, in order; empty for a model without.

        Training compiles them one by one, computes them again with gradient checkpointing, and reparametrizes their
        matrices.
        """
        return []

    def training_options(self, height: int, width: int, generator: torch.Generator | None = None) -> dict[str, Any]:
        """Keyword arguments of one training forward for images of `height` x `width` pixels.

        Args:
            generator (`torch.Generator`, *optional*): For random options; on the CPU, equally seeded on all ranks.
        """
        return {}

    def training_warnings(self, sizes: list[tuple[int, int]]) -> list[str]:
        """Settings of the configuration without effect for training images of these `(height, width)` in pixels.

        Raises:
            ValueError: A field of the configuration has no effect at all.
        """
        return []

    def attention_saving(self, height: int, width: int) -> float:
        """Share of the attention's FLOPs, in [0, 1), that `training_options` save on average; sides in pixels."""
        return 0.0

    def no_weight_decay(self) -> set[str]:
        """Names of parameters with two axes or more that weight decay leaves out, as in timm."""
        return set()
