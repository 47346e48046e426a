"""Configuration of a RADIO backbone inside a transformers detector or segmenter."""

from typing import Any

from transformers import AutoConfig

from .configuration_radio import RadioConfig
from .errors_radio import shown
from .fields_radio import PartConfigMixin, StagesConfigMixin


class RadioBackboneConfig(StagesConfigMixin, PartConfigMixin, RadioConfig):  # type: ignore[misc]
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

    def _stages(self) -> list[str]:
        return ["stem"] + [f"stage{index}" for index in range(1, self.num_hidden_layers + 1)]

    @classmethod
    def _from_student(cls, config_dict: dict[str, Any]) -> dict[str, Any]:
        if config_dict["model_type"] != RadioConfig.model_type:
            raise ValueError(
                f"{cls.__name__}: model_type is {shown(config_dict['model_type'])}, whose own configuration chooses "
                "feature maps: load it with AutoConfig.from_pretrained(folder, out_indices=[...])."
            )
        # the same fields but for the auto_map, which names the classes of the student
        return {
            **{key: value for key, value in config_dict.items() if key != "auto_map"},
            "model_type": cls.model_type,
        }


RadioBackboneConfig.register_for_auto_class()
AutoConfig.register("radio_backbone", RadioBackboneConfig, exist_ok=True)
