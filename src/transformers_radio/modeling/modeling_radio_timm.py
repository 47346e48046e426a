"""A network of timm as a student: its features, its pooled summary, and a pair of heads per teacher."""

import difflib
import re
from contextlib import nullcontext
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import can_return_tuple, logging

from .adaptors_radio import RadioAdaptor
from .configuration_radio_timm import RadioTimmConfig
from .errors_radio import OF_DAMAGED_FILES, naming_checkpoint, one_line, shown
from .fastervit_radio import complete_fastervit, fastervit_arguments, import_fastervit, is_fastervit
from .inputs_radio import (
    check_adaptors,
    check_images,
    check_outputs,
    check_size,
    nearest_multiple,
    returns_tensors_only,
)
from .student_radio import RadioInputConditioner, RadioModelOutput, RadioStudentMixin, init_shared_part
from .weights_radio import CheckedLoadingMixin

logger = logging.get_logger(__name__)

_NEEDED = "1.0.31"  # NFNet returns its stages since; buffers outside of the state dict can be filled since 1.0.24


class RadioTimmPreTrainedModel(CheckedLoadingMixin, PreTrainedModel):
    adaptors: nn.ModuleDict
    config_class = RadioTimmConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    gradient_checkpointing = False
    _keep_in_fp32_modules_strict = ["input_conditioner"]

    def __init__(self, config, *args, **kwargs):
        super().__init__(self.config_class.adopt(config), *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """Heads and conditioner; timm has initialized the network when it built it.

        Functions of `transformers.initialization` leave parameters that were loaded alone.
        """
        is_head = any(module is part for part in self.adaptors.modules())
        if is_head and isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=self.config.initializer_range)
            init.zeros_(module.bias)
        elif is_head and isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif not init_shared_part(module, self.config) and callable(
            fill := getattr(module, "init_non_persistent_buffers", None)
        ):
            fill()  # of timm: no checkpoint has these buffers

    @staticmethod
    def _finalize_model_loading(model, load_config, loading_info):
        missing = sorted(key for key in loading_info.missing_keys if key.startswith("network."))
        if missing:  # whatever `allow_missing` says
            raise ValueError(
                f"{type(model).__name__}: {len(missing)} weights of the network are not in the checkpoint, "
                f"{missing[0]} among them: it is of another network, or of a version of timm that names them "
                "otherwise."
            )
        return CheckedLoadingMixin._finalize_model_loading(model, load_config, loading_info)


class RadioTimmModel(RadioStudentMixin, RadioTimmPreTrainedModel):
    """A network of timm (paper Sec. 5.1, Table 6) with the adaptors of `config.adaptors`.

    Features are what the network's `forward_features` returns, or the maps of an earlier stage with
    `config.feature_stride`. The summary is what its classifier would read, `forward_head(..., pre_logits=True)`; its
    width may differ from that of the features. Sides are multiples of the network's largest stride. Networks that are
    built for one size take `config.image_size` alone.

    Building a model fills in the fields of its configuration that follow from the network.
    """

    network: Any

    def __init__(self, config: RadioTimmConfig):
        super().__init__(config)
        config = self.config
        config.validate()  # fields may have been set after construction
        self.network = build_network(config)
        strides = [stage["reduction"] for stage in self.network.feature_info]
        self.total_stride: int = strides[-1]
        # the stage that the features come from; None for the network's end
        self.feature_stage: int | None = None
        if config.feature_stride not in (None, self.total_stride):
            if config.feature_stride not in strides:
                raise ValueError(
                    f"feature_stride is {config.feature_stride}, but the stages of {config.timm_model} have the "
                    f"strides {', '.join(map(str, sorted(set(strides))))}; choose one of them."
                )
            self.feature_stage = len(strides) - 1 - strides[::-1].index(config.feature_stride)
        self._complete_config()
        self.input_conditioner: nn.Module = RadioInputConditioner(config)
        self.adaptors = nn.ModuleDict(
            {
                name: RadioAdaptor(self.feature_dim, adaptor, summary_width=self.summary_dim)
                for name, adaptor in config.adaptors.items()
            }
        )
        self._no_split_modules = sorted({type(block).__name__ for block in self.blocks})
        self.post_init()

    def _complete_config(self):
        """Writes what follows from the network into the configuration."""
        config, network, stage = self.config, self.network, self.feature_stage
        found = {
            "hidden_size": network.num_features if stage is None else network.feature_info[stage]["num_chs"],
            "summary_size": network.head_hidden_size,
            "patch_size": self.total_stride if stage is None else config.feature_stride,
        }
        for name, value in found.items():
            if getattr(config, name) not in (None, value):
                raise ValueError(
                    f"{name} is {getattr(config, name)}, but {config.timm_model} with feature_stride="
                    f"{config.feature_stride} has {value}; leave this field out."
                )
            setattr(config, name, value)
        if config.image_size is not None and config.image_size % self.total_stride:
            raise ValueError(
                f"image_size is {config.image_size}, which is not a multiple of {config.timm_model}'s stride of "
                f"{self.total_stride}; set image_size={nearest_multiple(config.image_size, self.total_stride)}."
            )
        if config.preferred_resolution is None:
            own = config.image_size or network.pretrained_cfg["input_size"][-1]
            config.preferred_resolution = nearest_multiple(own, self.total_stride)
        for name in ("norm_mean", "norm_std"):
            if getattr(config, name) is None:
                setattr(config, name, network.pretrained_cfg[name.removeprefix("norm_")])
        config.validate()

    @classmethod
    def from_timm(cls, timm_model: str, checkpoint: str | None = None, **fields) -> "RadioTimmModel":
        """A student whose network has weights of timm, such as ImageNet's; its heads, if any, are new.

        Save it, and training continues from it with `student.checkpoint`, with heads for the recipe's teachers.

        Args:
            timm_model (`str`): As in the configuration; the tag behind the dot chooses among timm's weights.
            checkpoint (`str`, *optional*): A file of weights of this network (safetensors, or tensors saved by torch)
                in place of timm's own, which are downloaded from the Hub.
            fields: Other fields of the configuration.

        Raises:
            OSError: There is no such file.
            ValueError: An unknown network, weights that cannot be had or do not fit, or a field out of range.
        """
        config = RadioTimmConfig.from_size(timm_model, **fields)
        model = cls(config)
        source = build_network(config, checkpoint if checkpoint is not None else True).state_dict()
        # with its classifier, so that timm compares all names
        model.network.load_state_dict({name: source[name] for name in model.network.state_dict()})
        return model

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        adaptors: list[str] | None = None,
        output_hidden_states: bool | None = None,
    ) -> RadioModelOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(batch, channels, height, width)`): Floats in [0, 1]; sides are
                multiples of `total_stride`, or `config.image_size` where the network is built for one size.
            adaptors (`list[str]`, *optional*): Adaptors to run; all when missing, none with `[]`.
            output_hidden_states (`bool`, *optional*): Return the maps of the network's stages, `(B, C, h, w)` each, as
                timm's `forward_intermediates` returns them: before a last convolution or norm, if there is one.

        Raises:
            ValueError: Not floats, a wrong number of channels or dimensions, an image size that the network does not
                take, an unknown adaptor.
        """
        names = check_adaptors(adaptors, list(self.adaptors))
        check_outputs(output_hidden_states, None)
        self.check_images(pixel_values)
        self._warn_about_range(pixel_values)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        wants_stages = wanted is not None and wanted is not False
        grid = self.grid(*pixel_values.shape[-2:])

        pixels = self.input_conditioner(pixel_values).to(next(self.network.parameters()).dtype)
        stages: list[torch.Tensor] = []  # (B, C, h, w) each
        if self.feature_stage is None and not wants_stages:
            final = self.network.forward_features(pixels)
        else:
            final, stages = self.network.forward_intermediates(pixels, output_fmt="NCHW")
        summary = self.network.forward_head(final, pre_logits=True)  # (B, D)
        if self.feature_stage is not None:
            features = stages[self.feature_stage].flatten(2).transpose(1, 2)  # (B, D, h, w) -> (B, h*w, D)
        else:
            features = self._tokens(final)

        dense = features.clone(memory_format=torch.contiguous_format) if names else features  # one copy for all heads
        heads = {name: self.adaptors[name](summary.unsqueeze(1), dense, [grid]) for name in names}
        return RadioModelOutput(
            summary=summary,
            features=features,
            last_hidden_state=features,
            hidden_states=tuple(stages) if wants_stages else None,
            adaptors=heads,
            pooler_output=summary,
            grid=None if returns_tensors_only() else grid,
        )

    def _tokens(self, final: torch.Tensor) -> torch.Tensor:
        """What the network's `forward_features` returns, in its own layout -> `(B, h*w, D)`."""
        if final.ndim == 3:
            return final[:, getattr(self.network, "num_prefix_tokens", 0) :]  # (B, prefix + h*w, D)
        if getattr(self.network, "output_fmt", "NCHW") == "NHWC":
            return final.flatten(1, 2)  # (B, h, w, D) -> (B, h*w, D)
        return final.flatten(2).transpose(1, 2)  # (B, D, h, w) -> (B, h*w, D)

    @property
    def num_intermediates(self) -> int:
        """Number of stages (of a vision transformer, blocks), the maps that `forward_intermediates` chooses among."""
        return len(self.network.feature_info)

    def _intermediates(self, pixel_values, wanted, stop, norm):
        network, stage = self.network, self.feature_stage
        pixels = self.input_conditioner(pixel_values).to(next(network.parameters()).dtype)
        has_prefix = getattr(network, "num_prefix_tokens", 0) > 0
        options = {"return_prefix_tokens": True} if has_prefix else {}
        reads_stage = stage is not None and (stop is None or stop > stage)  # features of forward
        indices = sorted({*wanted, stage}) if reads_stage else wanted
        final, found = network.forward_intermediates(
            pixels, indices=indices, norm=norm, stop_early=stop is not None, output_fmt="NCHW", **options
        )
        pairs = found if has_prefix else [(maps, None) for maps in found]
        last = pairs[indices.index(stage)][0].flatten(2).transpose(1, 2) if reads_stage else self._tokens(final)
        return last, [pair for index, pair in zip(indices, pairs, strict=True) if index in wanted]

    # ---------------------------------------------------------------- the contract of every student

    @property
    def min_resolution_step(self) -> int:
        """Image sides must be multiples of this many pixels: the network's largest stride, or its only size."""
        return self.config.image_size or self.total_stride

    @property
    def max_resolution(self) -> int:
        """Image side in pixels up to which the model was made; the only one if it is built for one size."""
        return self.config.image_size or self.config.max_img_size

    @property
    def summary_dim(self) -> int:
        """Width of `RadioModelOutput.summary`."""
        return self.config.summary_size

    def get_nearest_supported_resolution(self, height: int, width: int) -> tuple[int, int]:
        """The nearest `(height, width)` in pixels that the model takes."""
        check_size(height, width)
        if self.config.image_size is not None:
            return self.config.image_size, self.config.image_size
        return super().get_nearest_supported_resolution(height, width)

    def check_images(self, pixel_values: torch.Tensor):
        """Raises ValueError unless `forward` takes these images."""
        config, weight = self.config, next(self.network.parameters())
        check_images(pixel_values, config.num_channels, self.total_stride, weight)
        height, width = pixel_values.shape[-2:]
        if config.image_size is not None and (height, width) != (config.image_size, config.image_size):
            raise ValueError(
                f"pixel_values are {height}x{width} pixels, but {config.timm_model} is built for one size, "
                f"{config.image_size}x{config.image_size}: resize to it, or train a student with another image_size."
            )

    @property
    def blocks(self) -> list[nn.Module]:
        """The network's blocks in order: the groups of timm's layer-wise learning rates."""
        groups = r"^stages\.(\d+)"
        if hasattr(self.network, "group_matcher"):
            groups = self.network.group_matcher(coarse=False)["blocks"]
        patterns = [groups] if isinstance(groups, str) else [pattern for pattern, place in groups if place is None]
        modules = dict(self.network.named_modules())
        found = [module for name, module in modules.items() if any(re.fullmatch(one, name) for one in patterns)]
        # some networks have groups of whole stages
        return [block for group in found for block in getattr(group, "blocks", [group])]

    def _fuse_parts(self):
        dtype = next(self.network.parameters()).dtype
        if dtype.itemsize < 4:
            self.network.float()  # sums of kernels lose digits
        _import_timm().utils.reparameterize_model(self.network, inplace=True)  # what timm has for some networks
        self.network.to(dtype)  # timm's new layers are in float32

    def no_weight_decay(self) -> set[str]:
        """What timm's own training leaves out, such as position biases."""
        named: set[str] = getattr(self.network, "no_weight_decay", set)()
        return {f"network.{name}" for name, _ in self.network.named_parameters() if name in named}

    def _set_gradient_checkpointing(self, enable: bool = True, *arguments: Any, **options: Any):  # timm has its own
        if not hasattr(self.network, "set_grad_checkpointing"):
            raise ValueError(f"{self.config.timm_model} has no gradient checkpointing; leave it off.")
        self.network.set_grad_checkpointing(enable)
        self.gradient_checkpointing = enable

    def _share_weights(self, model: Any, **grown: torch.Tensor) -> Any:
        model = super()._share_weights(model, **grown)
        for mine, other in zip(self.network.modules(), model.network.modules(), strict=True):
            for name in mine._non_persistent_buffers_set:  # the state dict has none of these
                other._buffers[name] = mine._buffers[name]
        return model


def build_network(config: Any, weights: str | bool = False) -> Any:
    """timm's network; with `weights`, which are a file or, with True, timm's own, it has its classifier too.

    Fills in `config.image_size` for a network of one size.

    Raises:
        ImportError: timm or FasterViT's package is not installed, or too old.
        OSError: there is no such file.
        ValueError: timm does not know the network, or cannot build it or load its weights.
    """
    timm, name = _import_timm(), config.timm_model
    if is_fastervit(name):
        import_fastervit()
    cfg = _pretrained_cfg(timm, config)
    arguments = {**config.model_args, "in_chans": config.num_channels}
    if cfg.fixed_input_size:
        if config.image_size is None:
            config.image_size = cfg.input_size[-1]
        if is_fastervit(name):
            arguments |= fastervit_arguments(name, config.image_size, cfg.input_size[-1])
        else:
            arguments["img_size"] = (config.image_size, config.image_size)
    elif config.image_size is not None:
        raise ValueError(f"image_size is {config.image_size}, but {name} takes images of any size; leave it out.")
    if weights is False:
        arguments["num_classes"] = 0
    elif is_fastervit(name):
        raise ValueError(
            f"from_timm cannot load weights of {name}, whose package has its own way: build "
            f"RadioTimmModel(RadioTimmConfig(timm_model={name!r})), then load them into model.network."
        )
    else:
        arguments["pretrained"] = True
        if weights is not True:
            arguments["pretrained_cfg_overlay"] = {"state_dict": _read_weights(str(weights))}
    try:
        # FasterViT's package computes while it builds, which tensors on the meta device cannot
        with torch.device("cpu") if is_fastervit(name) else nullcontext():
            network = timm.create_model(name, **arguments)
    except (OSError, ValueError, *OF_DAMAGED_FILES) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        what = "build" if weights is False else "load the weights of"
        raise ValueError(
            f"timm {timm.__version__} cannot {what} {name} (image_size={config.image_size}, model_args="
            f"{shown(config.model_args)}): {one_line(error)}."
        ) from error
    if is_fastervit(name):
        complete_fastervit(network)
        network = network.to(torch.get_default_device())
    return network


def _pretrained_cfg(timm: Any, config: Any) -> Any:
    """What timm says of the network and its weights.

    Raises:
        ValueError: it knows no such network, or no such weights.
    """
    name = config.timm_model
    if not timm.is_model(name):
        near = difflib.get_close_matches(name.split(".")[0], [*config.sizes(), *timm.list_models()], n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "see timm.list_models()."
        if name in config.sizes():
            hint = f"that is a size of ours: RadioTimmConfig.from_size({name!r})."
        raise ValueError(f"timm {timm.__version__} has no network {shown(name)}; {hint}")
    try:
        return timm.get_pretrained_cfg(name)
    except RuntimeError as error:  # an unknown tag
        known = ", ".join(timm.list_pretrained(f"{name.split('.')[0]}.*")) or "none"
        raise ValueError(f"timm {timm.__version__} has no weights {shown(name)}; it has {known}.") from error


def _read_weights(path: str) -> dict[str, torch.Tensor]:
    """A file's tensors, read without running code."""
    with naming_checkpoint(path):
        if path.endswith(".safetensors"):
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    for name in ("state_dict_ema", "model_ema", "state_dict", "model"):  # beside what else timm's training saves
        state = state.get(name, state)
    return {name.removeprefix("module."): weight for name, weight in state.items()}


def _import_timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise ImportError(
            f"RadioTimmModel needs timm, which is not installed: pip install 'timm>={_NEEDED}'"
        ) from error
    return timm


RadioTimmModel.register_for_auto_class("AutoModel")

__all__ = ["RadioTimmModel", "RadioTimmPreTrainedModel"]
