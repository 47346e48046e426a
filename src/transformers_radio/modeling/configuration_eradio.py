"""Configuration of E-RADIO, the efficient student (paper Sec. 5.1)."""

from dataclasses import field
from typing import Any, Literal

from transformers import AutoConfig, PreTrainedConfig

from .errors_radio import shown
from .fields_radio import CheckedConfigMixin, StagesConfigMixin, complete_adaptors

_TABLE = {"pre_convolution": False, "neck": "pixel_shuffle", "preferred_resolution": 224}
# The networks of the paper's backbone table (Table 6), those that only its text lists, and the one that was released
# later, which is another network: convolutions before attention, and another neck.
_SIZES: dict[str, dict[str, Any]] = {
    "xt": {**_TABLE, "embed_dim": 64, "depths": [1, 3, 4, 5]},
    "t": {**_TABLE, "embed_dim": 80, "depths": [1, 3, 4, 5]},
    "s": {**_TABLE, "embed_dim": 96, "depths": [3, 3, 5, 5]},
    "b": {**_TABLE, "embed_dim": 128, "depths": [3, 3, 5, 5]},
    "b-no-upsample": {**_TABLE, "embed_dim": 128, "depths": [3, 3, 5, 5], "neck": None},
    "l": {**_TABLE, "embed_dim": 192, "depths": [3, 3, 5, 5]},
    "released": {
        **{"embed_dim": 192, "depths": [3, 3, 5, 5], "pre_convolution": True, "neck": "depthwise"},
        "preferred_resolution": 512,
    },
    # Ours, not the paper's, for a phone and for a few cores: one bottleneck in each stage of convolutions, whose time
    # is large and whose parameters are few.
    "phone": {**_TABLE, "embed_dim": 40, "depths": [1, 1, 2, 2], "num_heads": [5, 10], "stem_channels": 32},
    "cpu": {**_TABLE, "embed_dim": 48, "depths": [1, 1, 4, 5], "num_heads": [6, 12], "stem_channels": 32},
}


class ERadioConfig(StagesConfigMixin, CheckedConfigMixin, PreTrainedConfig):  # type: ignore[misc]
    """Configuration of an [`ERadioModel`]. The defaults are those of E-RADIO-B in the paper's backbone table.

    Args:
        adaptors (`dict[str, dict]`): One entry per teacher, as in [`RadioConfig`]; `summary_token` is 0 throughout.
        embed_dim (`int`): Channels of the first stage; each further stage has twice as many, so that `hidden_size`,
            the width of features and summary, is eight times this.
        depths (`list[int]`): Of the four stages. The first two have one C2f block each with so many bottlenecks; the
            third so many pairs of blocks, the first of a pair at half the resolution; the fourth so many blocks.
        num_heads (`list[int]`): Attention heads of stages 3 and 4.
        stem_channels (`int`): Channels between the two convolutions of the stem.
        mlp_ratio (`float`): Width of the MLPs over that of their stage.
        pre_convolution (`bool`): A 3x3 convolution before attention at full resolution (the released network).
        neck (`"pixel_shuffle"`, `"depthwise"` or `None`): Joins stages 3 and 4 to features at stride 16, as in
            the backbone table, or as in the released network. `None`: stage 4 alone, features at stride 32.
        window_size (`int`, *optional*): Side of the attention windows in places of the map at stride 32; the map at
            stride 16 has windows of the same size. `None`: from the size of the image, see
            [`ERadioModel.window_for`]. The released checkpoint stores 16, and its code chooses by the image: at
            resolutions other than 512 the two give different features.
        max_window_size (`int`): The largest side that `window_size=None` chooses.
        preferred_resolution (`int`): Image side in pixels at which the model is best.
        max_img_size (`int`): Image side in pixels up to which it is meant to be used. Larger images run.
        out_features, out_indices: The maps of an [`ERadioBackbone`], as names or as indices into `stage_names`:
            "stem", "stage1" to "stage4" at strides 4, 4, 8, 16 and 32, and "neck" at 16 if there is one. The last one
            if neither is given. Other models ignore them.

    Raises:
        ValueError: A value is out of range or contradicts another one; the message names both and the fix.
    """

    model_type = "eradio"

    adaptors: dict[str, dict[str, Any]] = field(default_factory=dict)
    num_channels: int = 3
    embed_dim: int = 128
    depths: list[int] | tuple[int, ...] = (3, 3, 5, 5)
    num_heads: list[int] | tuple[int, ...] = (8, 16)
    stem_channels: int = 64
    mlp_ratio: float | int = 4.0
    pre_convolution: bool = False
    neck: Literal["pixel_shuffle", "depthwise"] | None = "pixel_shuffle"
    window_size: int | None = None
    max_window_size: int = 16
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    preferred_resolution: int = 224
    max_img_size: int = 2048
    norm_mean: list[float] | tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    norm_std: list[float] | tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs):
        self.depths, self.num_heads = list(self.depths), list(self.num_heads)
        super().__post_init__(**kwargs)
        self.validate()

    def validate(self):
        """Check what concerns several fields; models do it before they are built, and saving does."""
        super().validate()
        self.adaptors = complete_adaptors(type(self).__name__, self.adaptors, tokens=1)
        channels = (1, self.num_channels)
        for name, ok, expected in (
            ("depths", len(self.depths) == 4, "four numbers, one for each stage"),
            ("embed_dim", self.embed_dim % 2 == 0, "an even number: C2f blocks halve it"),
            (
                "num_heads",
                len(self.num_heads) == 2
                and all(width % heads == 0 for width, heads in zip(self.channels[2:], self.num_heads, strict=True)),
                f"two divisors of the widths of stages 3 and 4, {self.channels[2:]}",
            ),
            (
                "mlp_ratio",
                int(self.mlp_ratio * self.channels[2]) > 0,
                f"at least 1 / {self.channels[2]}, so that the MLPs of stage 3 have a channel",
            ),
            (
                "window_size",
                self.window_size is None or 1 <= self.window_size <= 256,
                "an integer from 1 to 256, or None for windows that follow from the image",
            ),
            (
                "preferred_resolution",
                self.preferred_resolution % 32 == 0,
                "a multiple of 32, the stride of the last stage",
            ),
            ("norm_mean", len(self.norm_mean) in channels, f"one number for each of num_channels={self.num_channels}"),
            ("norm_std", len(self.norm_std) in channels, f"one number for each of num_channels={self.num_channels}"),
        ):
            if not ok:
                raise ValueError(f"{type(self).__name__}: {name} is {getattr(self, name)!r}, expected {expected}.")

    def _stages(self) -> list[str]:
        return ["stem", "stage1", "stage2", "stage3", "stage4", *(["neck"] if self.neck else [])]

    @property
    def channels(self) -> list[int]:
        """Of the maps of the four stages, at strides 4, 8, 16 and 32."""
        return [self.embed_dim * factor for factor in (1, 2, 4, 8)]

    @property
    def hidden_size(self) -> int:
        """Width of the features and of the summary."""
        return 8 * self.embed_dim

    @property
    def patch_size(self) -> int:
        """Stride of the features in pixels."""
        return 32 if self.neck is None else 16

    @classmethod
    def sizes(cls) -> dict[str, dict[str, Any]]:
        """Name -> fields. `b`, `b-no-upsample` and `l` are the backbone table's (Table 6); `released` is the network
        that was published as E-RADIO-L, which Table 1 measures; `xt`, `t` and `s` are in the text; `phone` and `cpu`
        are ours."""
        return {name: dict(size) for name, size in _SIZES.items()}

    @classmethod
    def from_size(cls, size: str, **overrides) -> "ERadioConfig":
        """The configuration of a size, with other values for some fields.

        Raises:
            ValueError: an unknown size or field.
        """
        sizes = cls.sizes()
        if size not in sizes:
            raise ValueError(f"there is no size {shown(size)}; choose one of {', '.join(sizes)}.")
        cls.check_known(overrides)
        return cls(**{**sizes[size], **overrides})

    @classmethod
    def for_training(
        cls, size: str, adaptors: dict[str, dict[str, Any]], summary: str = "mean", **fields
    ) -> "ERadioConfig":
        """Configuration of a student that is trained from scratch: see [`RadioConfig.for_training`].

        Raises:
            ValueError: an unknown size or field, a value out of range, or another summary than "mean".
        """
        if summary != "mean":
            raise ValueError(f'summary is {shown(summary)}, expected "mean": E-RADIO has no CLS tokens.')
        adaptors = {name: {**adaptor, "summary_token": 0} for name, adaptor in adaptors.items()}
        return cls.from_size(size, adaptors=adaptors, **fields)


ERadioConfig.register_for_auto_class()
AutoConfig.register("eradio", ERadioConfig, exist_ok=True)

__all__ = ["ERadioConfig"]
