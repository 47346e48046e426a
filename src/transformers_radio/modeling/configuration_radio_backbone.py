"""Configuration of a RADIO backbone inside a transformers detector or segmenter."""

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig
from transformers.backbone_utils import BackboneConfigMixin

from .configuration_radio import RadioConfig


@strict
class RadioBackboneConfig(BackboneConfigMixin, RadioConfig):
    """A RADIO configuration plus the choice of feature maps, for `backbone_config=` of transformers' dense models.

    It is a type of its own because transformers knows type "radio" without a backbone class. It reads the folder of a
    RADIO student of ours: `RadioBackboneConfig.from_pretrained(folder, out_indices=[3, 6, 9, 12])`.

    Args:
        out_features: names of the feature maps out of `stage_names`: "stem" (the embeddings), "stage1" to
            "stage<num_hidden_layers>" (after each block). The last one when neither this nor `out_indices` is given.
        out_indices: the same as indices into `stage_names`.

    Raises:
        ValueError: for names or indices that do not exist, repeat, or are out of order.
    """

    model_type = "radio_backbone"

    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs):
        self.stage_names = ["stem"] + [f"stage{index}" for index in range(1, self.num_hidden_layers + 1)]
        self.set_output_features_output_indices(
            out_features=kwargs.pop("out_features", None), out_indices=kwargs.pop("out_indices", None)
        )
        super().__post_init__(**kwargs)

    @classmethod
    def get_config_dict(cls, *args, **kwargs):
        config_dict, kwargs = super().get_config_dict(*args, **kwargs)
        if config_dict.get("model_type") == RadioConfig.model_type:
            config_dict["model_type"] = cls.model_type  # the same fields, so no warning about another type
            config_dict.pop("auto_map", None)  # names the classes of the student
        return config_dict, kwargs


RadioBackboneConfig.register_for_auto_class()
AutoConfig.register("radio_backbone", RadioBackboneConfig, exist_ok=True)
