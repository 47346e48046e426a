"""Configuration of the RADIO vision transformer, a superset of the configuration that transformers ships."""

from dataclasses import field
from typing import Any, Literal

from transformers import PreTrainedConfig
from transformers import RadioConfig as NativeRadioConfig

from .errors_radio import shown
from .fields_radio import CheckedConfigMixin, complete_adaptors

# width, depth, heads, MLP width; patch 16 throughout
_SIZES = {
    "vit-ti-16": (192, 12, 3, 768),
    "vit-s-16": (384, 12, 6, 1536),
    "vit-b-16": (768, 12, 12, 3072),
    "vit-l-16": (1024, 24, 16, 4096),
    "vit-h-16": (1280, 32, 16, 5120),
    "vit-so400m-16": (1152, 27, 16, 4304),
    "vit-g-16": (1536, 40, 24, 6144),
}
_REFUSAL = "transformers' own RADIO class cannot read this checkpoint"


class RadioConfig(CheckedConfigMixin, NativeRadioConfig):  # type: ignore[misc]
    """Configuration of a [`RadioModel`]; all fields of `transformers.RadioConfig` keep their meaning and default.

    Args:
        adaptors (`dict[str, dict]`): One entry per teacher, `name -> {"summary_dim": int | None, "feature_dim": int |
            None, "hidden_dim": int, "summary_token": int, "teacher": str}`. `summary_token` is the CLS token that the
            summary head reads (0 with one shared CLS token or average pooling); `teacher` says where the targets
            came from (TYPE:CHECKPOINT, of a local file or folder its name alone); the optional `teacher_weights` is a
            hash of the weights that gave them. Other optional keys describe the heads of released checkpoints:
            `mlp_version` ("v2", the paper's head (Sec. 3.2), or "v1"), `mlp_num_inner` (inner blocks, 0 in the paper),
            `spatial_mlp_version` ("v1", "v2" or "attn"; the feature head, as `mlp_version` when missing),
            `upsample_factor` (finer feature grid).
        summary_type (`"cls"` or `"mean"`): Summary from the CLS tokens `summary_idxs`, or the average of the features
            (Table 5). `summary_idxs` defaults to the CLS tokens that the adaptors' summary heads read.
        final_norm (`bool`): LayerNorm after the last block (the released `model_norm`).
        mlp_norm (`bool`): LayerNorm inside each MLP, between activation and `fc2` (the released `mlpnorm` variant).
        use_swiglu_ffn (`bool`): The gated MLP of DINOv2's largest size in place of the plain one (RADIOv2.5-g).
        patch_bias (`bool`): The patch projection has a bias (RADIOv2.5-g).
        feature_normalizer (`bool`): A fixed linear map standardizes the features (RADIOv2.5-H-norm).
        intermediate_normalizer (`"shared"`, `"per_layer"` or `None`): Fixed maps for the outputs of the blocks, with
            one rotation or one for each, at `RadioModel.intermediate_normalizer`; no output passes through it.
        converted_from (`dict`, *optional*): `source`, `version`, `license` and `license_url` of a converted release.
        window_size (`int`, *optional*): Side, in patches, of the ViTDet windows used by default; `None` or 0 is global
            attention in every block. A call may choose another one.
        window_num_global (`int`): Number of global blocks when windows are used; every `depth // window_num_global`-th
            block is global, and the last one always.
        window_num_windowed (`int`, *optional*): Windowed blocks before each global one, instead of
            `window_num_global` (v2 and v2.1 have 5).
        window_prefix (`"bypass"` or `"average"`): CLS and register tokens skip windowed blocks unchanged, or are
            copied into every window and averaged when the windows are joined again.
        train_window_sizes (`list[int]`, *optional*): Sizes drawn from while training (appendix "ViTDet as
            augmentation"); a size that does not divide the grid, or covers it whole, is left out of the draw.
        train_window_probability (`float`): Probability that a training forward uses a window at all.
        cpe_sampling (`bool`): Cropped position embedding: random crops of the position table while training.
        cpe_scale (`list[float]`): Smallest and largest share of the table's area that a crop covers.
        pos_dropout (`float`): Probability, per training image, of no position embedding (0.1 in released code).
        preferred_resolution (`int`, *optional*): Image side the model is best at; 432 (rounded to the patch size and
            at most `max_img_size`) when missing.

    Raises:
        ValueError: A value is out of range or contradicts another one; the message names both and the fix.
    """

    model_type = "radio"

    adaptors: dict[str, dict[str, Any]] = field(default_factory=dict)
    summary_type: Literal["cls", "mean"] = "cls"
    final_norm: bool = False
    mlp_norm: bool = False
    patch_bias: bool = False
    feature_normalizer: bool = False
    intermediate_normalizer: Literal["shared", "per_layer"] | None = None
    converted_from: dict[str, Any] | None = None
    window_size: int | None = None
    window_num_global: int = 4
    window_num_windowed: int | None = None
    window_prefix: Literal["bypass", "average"] = "bypass"
    train_window_sizes: list[int] | None = None
    train_window_probability: float | int = 0.5
    cpe_sampling: bool = True
    cpe_scale: list[float] | tuple[float, ...] = (0.1, 1.0)
    pos_dropout: float | int = 0.0
    preferred_resolution: int | None = None

    def __post_init__(self, **kwargs):
        self._check_adaptors()
        if self.summary_idxs is None:
            tokens = {a["summary_token"] for a in self.adaptors.values() if a.get("summary_dim") is not None}
            # without adaptors: the first two tokens, as transformers does
            self.summary_idxs = sorted(tokens) or list(range(min(2, self.num_cls_tokens)))
        if self.preferred_resolution is None:
            self.preferred_resolution = max(min(432, self.max_img_size) // self.patch_size, 1) * self.patch_size
        self.cpe_scale = list(self.cpe_scale)
        super().__post_init__(**kwargs)
        self.validate()

    def __setattr__(self, name: str, value: Any):
        # `to_dict` writes a sentence into this field when transformers' own class would misread the checkpoint: it is
        # typed `bool` there, so that class stops and prints the sentence
        if name == "use_swiglu_ffn" and isinstance(value, str) and value.startswith(_REFUSAL):
            value = "use_swiglu_ffn=True" in value
        super().__setattr__(name, value)

    def validate(self):
        """Check what concerns several fields; models do it before they are built, and saving does."""
        super().validate()
        self._check_adaptors()  # they may have been set after construction, as from_pretrained(adaptors=...) does
        channels = (1, self.num_channels)
        for name, ok, expected in (
            ("mlp_norm", not (self.mlp_norm and self.use_swiglu_ffn), "False: the gated MLP has no norm"),
            (
                "video_temporal_patch_size",
                getattr(self, "video_temporal_patch_size", None) is None,  # came with a later transformers
                "None: this model takes images only",
            ),
            ("num_attention_heads", self.hidden_size % self.num_attention_heads == 0, "a divisor of hidden_size"),
            ("mlp_ratio", self.hidden_size * self.mlp_ratio >= 1, "at least one channel in the MLP"),
            ("max_img_size", self.max_img_size % self.patch_size == 0, f"a multiple of patch_size {self.patch_size}"),
            (
                "preferred_resolution",
                self.preferred_resolution and self.preferred_resolution % self.patch_size == 0,
                f"a positive multiple of patch_size {self.patch_size}",
            ),
            (
                "num_cls_tokens",
                self.num_cls_tokens >= (1 if self.summary_type == "cls" else 0),
                '1 or more (0 with summary_type="mean")',
            ),
            (
                "summary_idxs",
                self.summary_type == "mean"
                or (self.summary_idxs and all(i < self.num_cls_tokens for i in self.summary_idxs)),
                f"a non-empty list of CLS tokens below num_cls_tokens {self.num_cls_tokens}",
            ),
            (
                "cpe_scale",
                len(self.cpe_scale) == 2 and 0 < self.cpe_scale[0] <= self.cpe_scale[1] <= 1,
                "[smallest, largest] with 0 < smallest <= largest <= 1",
            ),
            ("norm_mean", len(self.norm_mean) in channels, f"one number for each of num_channels={self.num_channels}"),
            ("norm_std", len(self.norm_std) in channels, f"one number for each of num_channels={self.num_channels}"),
        ):
            if not ok:
                raise ValueError(f"{type(self).__name__}: {name} is {getattr(self, name)!r}, expected {expected}.")

    def _check_adaptors(self):
        tokens = self.num_cls_tokens if self.summary_type == "cls" else 1
        self.adaptors = complete_adaptors(type(self).__name__, self.adaptors, tokens)

    @property
    def mlp_width(self) -> int:
        """Channels inside each MLP: `hidden_size * mlp_ratio`; of the gated one two thirds, rounded up to eights."""
        width = int(self.hidden_size * self.mlp_ratio)
        return (int(width * 2 / 3) + 7) // 8 * 8 if self.use_swiglu_ffn else width

    @property
    def global_blocks(self) -> list[int]:
        """Indices of the blocks with global attention when windows are used (the rule of the released models)."""
        if self.window_num_windowed is not None:
            period = self.window_num_windowed + 1
        else:
            period = max(self.num_hidden_layers // self.window_num_global, 1)
        last = self.num_hidden_layers - 1
        return [i for i in range(self.num_hidden_layers) if i % period == period - 1 or i == last]

    @property
    def summary_dim(self) -> int:
        """Width of `RadioModelOutput.summary`."""
        return self.hidden_size * (len(self.summary_idxs or ()) if self.summary_type == "cls" else 1)

    @classmethod
    def adopt(cls, config: PreTrainedConfig) -> Any:
        """`config` itself if it is of this class; else this class with its fields.

        `AutoConfig.from_pretrained(folder)` without trust_remote_code gives transformers' own class, which keeps the
        fields that it does not know.

        Raises:
            ValueError: The configuration of another kind of model, or of a variant that this model does not have.
        """
        kinds = {getattr(base, "model_type", None) for base in type(config).__mro__}
        if cls.model_type in kinds and hasattr(type(config), "global_blocks"):
            return config  # not by isinstance: as remote code, one file may be imported more than once
        if NativeRadioConfig.model_type not in kinds:
            raise ValueError(
                f"expected a {cls.__name__}, got a {type(config).__name__}; load it with {cls.__name__}"
                ".from_pretrained(folder), or AutoConfig.from_pretrained(folder, trust_remote_code=True)."
            )
        values = config.to_dict()
        if values.pop("model_type") != cls.model_type:
            values.pop("auto_map", None)  # names the classes of the student
        values |= {"attn_implementation": config._attn_implementation, "name_or_path": config.name_or_path}
        return cls.from_dict(values)

    @staticmethod
    def sizes() -> dict[str, dict[str, Any]]:
        """The named sizes that `from_size` knows, with their fields."""
        return {
            name: {
                "hidden_size": width,
                "num_hidden_layers": depth,
                "num_attention_heads": heads,
                "mlp_ratio": mlp / width,
                "patch_size": 16,
            }
            for name, (width, depth, heads, mlp) in _SIZES.items()
        }

    @classmethod
    def from_size(cls, size: str, **overrides) -> "RadioConfig":
        """Configuration of a named size, e.g. `RadioConfig.from_size("vit-b-16", num_cls_tokens=1)`.

        Raises:
            ValueError: `size` is not one of `RadioConfig.sizes()`, or an override is not a field of the configuration.
        """
        sizes = cls.sizes()
        if size not in sizes:
            raise ValueError(f"Unknown size {size!r}; choose one of {', '.join(sizes)}.")
        cls.check_known(overrides)
        return cls(**{**sizes[size], **overrides})

    @classmethod
    def for_training(
        cls, size: str, adaptors: dict[str, dict[str, Any]], summary: str = "cls_per_teacher", **fields
    ) -> "RadioConfig":
        """Configuration of a student that is trained from scratch.

        Args:
            size (`str`): One of `RadioConfig.sizes()`.
            adaptors (`dict[str, dict]`): One entry per teacher, as in the configuration; `summary_token` is chosen
                here.
            summary (`str`): `"cls_per_teacher"`, one CLS token per summary head; `"cls"`, one for all of them; or
                `"mean"`, the average of the features (Table 5).
            fields: Other fields of the configuration; they replace values of the size.

        Raises:
            ValueError: An unknown size, summary or field, or a value out of range.
        """
        if summary not in ("cls_per_teacher", "cls", "mean"):
            raise ValueError(f'summary is {shown(summary)}, expected "cls_per_teacher", "cls" or "mean".')
        adaptors = {name: {**adaptor, "summary_token": 0} for name, adaptor in adaptors.items()}
        num_cls_tokens = 0 if summary == "mean" else 1
        if summary == "cls_per_teacher":
            summarized = [adaptor for adaptor in adaptors.values() if adaptor.get("summary_dim") is not None]
            num_cls_tokens = max(len(summarized), 1)
            for token, adaptor in enumerate(summarized):
                adaptor["summary_token"] = token
        return cls.from_size(
            size,
            adaptors=adaptors,
            summary_type="mean" if summary == "mean" else "cls",
            num_cls_tokens=num_cls_tokens,
            summary_idxs=list(range(num_cls_tokens)),
            **fields,
        )

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, with a refusal for its own RADIO class where that would give other features."""
        output = super().to_dict()
        native = {"summary_type": "cls", "final_norm": False, "mlp_norm": False, "window_size": None}
        native |= {"patch_bias": False, "feature_normalizer": False}
        ours = [f"{name}={getattr(self, name)!r}" for name in native if getattr(self, name) != native[name]]
        if ours:
            ours += ["use_swiglu_ffn=True"] if self.use_swiglu_ffn else []  # read again from this sentence
            output["use_swiglu_ffn"] = (
                f"{_REFUSAL} ({', '.join(ours)}): load it with "
                "AutoModel.from_pretrained(..., trust_remote_code=True), or `pip install transformers_radio` and use "
                "transformers_radio.RadioModel.from_pretrained(...)"
            )
        return output


RadioConfig.register_for_auto_class()

__all__ = ["RadioConfig"]
