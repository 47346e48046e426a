"""Configuration of a RADIO backbone inside a transformers detector or segmenter."""

from typing import Any

from transformers import AutoConfig
from transformers.backbone_utils import BackboneConfigMixin

from .configuration_radio import RadioConfig
from .errors_radio import shown
from .fields_radio import PartConfigMixin


class RadioBackboneConfig(BackboneConfigMixin, PartConfigMixin, RadioConfig):  # type: ignore[misc]
    """A RADIO configuration plus the choice of feature maps, for `backbone_config=` of transformers' dense models.

    It is a type of its own because transformers knows type "radio" without a backbone class. It reads the folder of a
    RADIO student of ours: `RadioBackboneConfig.from_pretrained(folder, out_indices=[3, 6, 9, 12])`. A model that is
    built from it has random weights; `load_student(model, folder)` replaces them by the student's.

    Args:
        out_features: names of the feature maps, from `stage_names`: "stem" (the embeddings), "stage1" to
            "stage<num_hidden_layers>" (after each block). The last one when neither this nor `out_indices` is given.
        out_indices: the same as indices into `stage_names`.
        reshape_hidden_states: True for maps (batch_size, hidden_size, h, w). False for sequences (batch_size,
            1 + h * w, hidden_size), one summary token and the patches, as DPT and Depth Anything expect them.

    Raises:
        ValueError: Names or indices that do not exist, repeat, or are out of order.
    """

    model_type = "radio_backbone"

    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None
    reshape_hidden_states: bool = True

    def __post_init__(self, **kwargs):
        self.stage_names = self._stages()
        self.set_output_features_output_indices(
            out_features=kwargs.pop("out_features", None), out_indices=kwargs.pop("out_indices", None)
        )
        super().__post_init__(**kwargs)

    def set_output_features_output_indices(self, out_features: list[str] | None, out_indices: list[int] | None):
        """As in transformers, which would count an index below the first stage as another one."""
        self._out_features, self._out_indices = out_features, out_indices  # checks the types
        count = len(self.stage_names)
        if any(not -count <= index < count for index in out_indices or []):
            raise ValueError(
                f"{type(self).__name__}: out_indices is {shown(out_indices)}, expected indices into the {count} "
                f"stages {shown(self.stage_names)}."
            )
        super().set_output_features_output_indices(out_features, out_indices)

    def validate(self):
        """Check what concerns several fields; models do it before they are built, and saving does."""
        super().validate()
        if self.stage_names != self._stages():
            raise ValueError(
                f"{type(self).__name__}: stage_names is {shown(self.stage_names)}, expected one name for the stem and "
                f"for each of num_hidden_layers {self.num_hidden_layers}; leave it out."
            )

    def _stages(self) -> list[str]:
        return ["stem"] + [f"stage{index}" for index in range(1, self.num_hidden_layers + 1)]

    @classmethod
    def _from_student(cls, config_dict: dict[str, Any]) -> dict[str, Any]:
        # the same fields but for the auto_map, which names the classes of the student
        return {
            **{key: value for key, value in config_dict.items() if key != "auto_map"},
            "model_type": cls.model_type,
        }


RadioBackboneConfig.register_for_auto_class()
AutoConfig.register("radio_backbone", RadioBackboneConfig, exist_ok=True)
