"""Configuration of the vision tower that LLaVA builds."""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .configuration_eradio import ERadioConfig
from .configuration_radio import RadioConfig
from .configuration_radio_timm import RadioTimmConfig
from .fields_radio import CheckedConfigMixin, PartConfigMixin

_STUDENTS: dict[str, Any] = {"radio": RadioConfig, "eradio": ERadioConfig, "radio_timm": RadioTimmConfig}


class RadioVisionTowerConfig(PartConfigMixin, CheckedConfigMixin, PreTrainedConfig):  # type: ignore[misc]
    """A RADIO configuration as the `vision_config` of `transformers.LlavaConfig`.

    It also reads the folder of a RADIO student: `RadioVisionTowerConfig.from_pretrained(folder)`. A LLaVA that is
    built from it has a tower with random weights; `load_student(llava, folder)` replaces them by the student's.

    Args:
        radio_config: the student's configuration, a [`RadioConfig`], [`ERadioConfig`] or [`RadioTimmConfig`], or its
            fields as a dict, with `model_type` unless it is a RADIO. The tower has no adaptors.
        image_size: nominal side of the input in pixels; the student's `preferred_resolution` when missing.

    Raises:
        ValueError: `image_size` is not a multiple of the patch size.
    """

    model_type = "radio_vision_tower"
    sub_configs_defaults = {"radio_config": SubConfigSpec(config_class=RadioConfig)}

    radio_config: Any = None
    image_size: int | None = None

    def __post_init__(self, **kwargs):
        fields = self.radio_config
        if isinstance(fields, PreTrainedConfig):
            fields = _config_class(fields.model_type).adopt(fields).to_dict()
        kind = fields.get("model_type") if isinstance(fields, dict) else None
        self.radio_config = _config_class(kind).from_dict({} if fields is None else fields)  # our own
        super().__post_init__(**kwargs)
        self.radio_config.adaptors = {}
        if self.image_size is None:
            self.image_size = self.radio_config.preferred_resolution
        self.validate()

    def validate(self):
        """Check what concerns several fields; models do it before they are built, and saving does."""
        super().validate()
        self.radio_config.validate()
        if not self.image_size or self.image_size % self.patch_size:
            raise ValueError(
                f"{type(self).__name__}: image_size is {self.image_size}, expected a multiple of patch_size "
                f"{self.patch_size}."
            )

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if "model_type" not in config_dict:
            raise ValueError(
                f"{pretrained_model_name_or_path}: model_type is missing, expected one of {', '.join(_STUDENTS)} or "
                f"{cls.model_type}."
            )
        return config_dict, kwargs

    @classmethod
    def _from_student(cls, config_dict: dict[str, Any]) -> dict[str, Any]:
        return {"model_type": cls.model_type, "radio_config": config_dict}

    @classmethod
    def adopt(cls, config: PreTrainedConfig) -> Any:
        """`config` itself if it is a tower's; else that of a student's configuration, see [`RadioConfig.adopt`]."""
        if getattr(config, "model_type", None) == cls.model_type:
            return config
        student = _config_class(getattr(config, "model_type", None)).adopt(config)
        tower = cls(radio_config=student)
        tower._attn_implementation = student._attn_implementation
        tower.name_or_path, tower.dtype = student.name_or_path, student.dtype
        return tower

    # what LLaVA and the loading of weights read from a vision config
    @property
    def hidden_size(self) -> int:
        return self.radio_config.hidden_size

    @property
    def patch_size(self) -> int:
        return self.radio_config.patch_size

    @property
    def num_hidden_layers(self) -> int:
        return self.radio_config.num_hidden_layers

    @property
    def num_attention_heads(self) -> int:
        return self.radio_config.num_attention_heads

    @property
    def summary_idxs(self) -> list[int]:
        return self.radio_config.summary_idxs


def _config_class(model_type: str | None) -> Any:
    """The configuration of a type of student; RADIO's, which refuses those that it cannot take over, otherwise."""
    return _STUDENTS.get(model_type or "radio", RadioConfig)


RadioVisionTowerConfig.register_for_auto_class()
AutoConfig.register("radio_vision_tower", RadioVisionTowerConfig, exist_ok=True)
