"""Configuration of a student whose backbone is a network of timm (the paper's backbone study, Sec. 5.1)."""

import copy
from dataclasses import field
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from .errors_radio import shown
from .fields_radio import CheckedConfigMixin, complete_adaptors

# read off the network when a model is built
_OF_THE_NETWORK = ("hidden_size", "summary_size", "patch_size", "norm_mean", "norm_std")
# `timm.create_model` gets these from elsewhere, or would read files and the network
_NOT_ARGUMENTS = {
    "img_size": "set image_size",
    "in_chans": "set num_channels",
    "num_classes": "a student has heads for its teachers",
    "features_only": "set feature_stride",
    "pretrained": "RadioTimmModel.from_timm loads weights",
    "checkpoint_path": "RadioTimmModel.from_timm loads weights",
    "pretrained_cfg": "RadioTimmModel.from_timm loads weights",
    "pretrained_cfg_overlay": "RadioTimmModel.from_timm loads weights",
}
# networks of the backbone table and newer ones, cut down to about 2 million parameters for experiments on a CPU
_SIZES: dict[str, dict[str, Any]] = {
    "convnext-2m": {"timm_model": "convnext_atto", "model_args": {"dims": [32, 64, 128, 256], "depths": [2, 2, 4, 2]}},
    "efficientnetv2-2m": {"timm_model": "tf_efficientnetv2_b0", "model_args": {"channel_multiplier": 0.6}},
    "efficientvit-2m": {"timm_model": "efficientvit_b0"},
    "fastvit-2m": {"timm_model": "fastvit_t8", "model_args": {"embed_dims": [36, 72, 144, 288]}},
    "hiera-2m": {"timm_model": "hiera_tiny_224", "model_args": {"embed_dim": 32, "stages": [1, 1, 3, 2]}},
    "regnety-2m": {"timm_model": "regnety_002", "model_args": {"depth": 11}},
    "repvit-2m": {
        "timm_model": "repvit_m0_9",
        "model_args": {"embed_dim": [32, 64, 128, 256], "depth": [2, 2, 10, 2]},
    },
    "resnetv2-2m": {"timm_model": "resnetv2_18", "model_args": {"channels": [32, 64, 112, 208]}},
    "swinv2-2m": {
        "timm_model": "swinv2_tiny_window8_256",
        "model_args": {"embed_dim": 32, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 4, 8]},
    },
}


class RadioTimmConfig(CheckedConfigMixin, PreTrainedConfig):  # type: ignore[misc]
    """Configuration of a [`RadioTimmModel`].

    Args:
        adaptors (`dict[str, dict]`): One entry per teacher, as in [`RadioConfig`]; `summary_token` is 0 throughout.
        timm_model (`str`): Name of the network as in `timm.list_models()`, with or without the tag of its weights:
            "convnext_base", "convnext_tiny.dinov3_lvd1689m". The tag brings the normalization and the image size that
            these weights were trained with, not the weights, which [`RadioTimmModel.from_timm`] loads.
        model_args (`dict`): More arguments of `timm.create_model`, such as `{"drop_path_rate": 0.1}`.
        feature_stride (`int`, *optional*): Take the features from the network's last stage with this stride in
            pixels, such as 16. `None`: from its end, as timm's `forward_features` returns them, at stride 32 for most.
            The summary always comes from the end.
        image_size (`int`, *optional*): Side in pixels of the images for a network that is built for one size (SwinV2,
            MaxViT, MViTv2, Hiera, LeViT, ...). `None`: the size of timm's own weights. Other networks take any size,
            and refuse this field.
        preferred_resolution (`int`, *optional*): Image side in pixels at which the model is best. `None`: the
            network's own, rounded to its stride.
        max_img_size (`int`): Image side in pixels up to which it is meant to be used, if the network takes any size.
        norm_mean, norm_std (`list[float]`, *optional*): `None`: those of timm's own weights.
        hidden_size, summary_size, patch_size (`int`, *optional*): Width of the features, width of the summary, and
            stride of the features in pixels. Leave them out: they follow from the network, and the model writes them.

    Raises:
        ValueError: A value is out of range or contradicts another one; the message names both and the fix.
    """

    model_type = "radio_timm"

    adaptors: dict[str, dict[str, Any]] = field(default_factory=dict)
    timm_model: str = "convnext_tiny"
    model_args: dict[str, Any] = field(default_factory=dict)
    feature_stride: int | None = None
    image_size: int | None = None
    num_channels: int = 3
    initializer_range: float = 0.02
    preferred_resolution: int | None = None
    max_img_size: int = 2048
    norm_mean: list[float] | tuple[float, ...] | None = None
    norm_std: list[float] | tuple[float, ...] | None = None
    hidden_size: int | None = None
    summary_size: int | None = None
    patch_size: int | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.validate()

    def __setattr__(self, name: str, value: Any):
        if value is None and name in _OF_THE_NETWORK:  # no model was built yet
            PreTrainedConfig.__setattr__(self, name, None)
        else:
            super().__setattr__(name, value)

    def validate(self):
        """Check what concerns several fields; models do it before they are built, and saving does."""
        super().validate()
        self.adaptors = complete_adaptors(type(self).__name__, self.adaptors, tokens=1)
        for name, fix in _NOT_ARGUMENTS.items():
            if name in self.model_args:
                raise ValueError(f"{type(self).__name__}: model_args has {name}; leave it out: {fix}.")
        for name in ("norm_mean", "norm_std"):
            statistic = getattr(self, name)
            if statistic is not None and len(statistic) not in (1, self.num_channels):
                expected = f"one number for each of num_channels={self.num_channels}"
                raise ValueError(f"{type(self).__name__}: {name} is {statistic!r}, expected {expected}.")

    @classmethod
    def sizes(cls) -> dict[str, dict[str, Any]]:
        """Name -> fields of a few small networks, with about 2 million parameters each, for experiments on a CPU."""
        return copy.deepcopy(_SIZES)

    @classmethod
    def from_size(cls, size: str, **overrides) -> "RadioTimmConfig":
        """The configuration of a network by its name in timm, or of one of `sizes()`, with some fields changed.

        Raises:
            ValueError: An unknown field. Names are compared with timm's own when a model is built.
        """
        cls.check_known(overrides)
        return cls(**{**cls.sizes().get(size, {"timm_model": size}), **overrides})

    @classmethod
    def for_training(
        cls, size: str, adaptors: dict[str, dict[str, Any]], summary: str = "mean", **fields
    ) -> "RadioTimmConfig":
        """Configuration of a student that is trained from scratch: see [`RadioConfig.for_training`].

        Args:
            size (`str`): The network by its name in timm, or one of `sizes()`.
            summary (`str`): "mean": what the network pools, as its classifier would read it.

        Raises:
            ValueError: An unknown field, a value out of range, or another summary than "mean".
        """
        if summary != "mean":
            raise ValueError(f'summary is {shown(summary)}, expected "mean": networks of timm pool their features.')
        adaptors = {name: {**adaptor, "summary_token": 0} for name, adaptor in adaptors.items()}
        return cls.from_size(size, adaptors=adaptors, **fields)


RadioTimmConfig.register_for_auto_class()
AutoConfig.register("radio_timm", RadioTimmConfig, exist_ok=True)

__all__ = ["RadioTimmConfig"]
