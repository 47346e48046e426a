"""Task heads on E-RADIO, and E-RADIO as a backbone with maps at strides 4 to 32."""

import copy

import torch
from torch import nn
from transformers import AutoBackbone
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import BackboneOutput
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES,
)
from transformers.utils import can_return_tuple

from .configuration_eradio import ERadioConfig
from .inputs_radio import check_layers
from .modeling_eradio import ERadioModel, ERadioPreTrainedModel
from .modeling_radio_heads import RadioForImageClassification, RadioForSemanticSegmentation
from .parts_radio import RadioPart, weight_state

# ERadioPreTrainedModel comes first: its configuration, initialization and saving are those of all classes here


class ERadioForImageClassification(ERadioPreTrainedModel, RadioForImageClassification):
    """[`RadioForImageClassification`] on an E-RADIO."""

    student_class = ERadioModel


class ERadioForSemanticSegmentation(ERadioPreTrainedModel, RadioForSemanticSegmentation):
    """[`RadioForSemanticSegmentation`] on an E-RADIO."""

    student_class = ERadioModel


class ERadioBackbone(BackboneMixin, ERadioPreTrainedModel, RadioPart):
    """Feature maps at strides 4, 4, 8, 16 and 32 for transformers' detectors and segmenters.

    The configuration is the student's, with `out_features` or `out_indices`. What comes after the last map is not
    built: its weights would get no gradients. The input is as [`ERadioModel`] takes it, without `pixel_mask`.

    Args:
        config: an [`ERadioConfig`]. Its adaptors are left out.
        out_features, out_indices: the maps; those of `config` when missing.
    """

    def __init__(self, config, out_features: list[str] | None = None, out_indices: list[int] | None = None):
        config = copy.deepcopy(ERadioConfig.adopt(config))
        config.adaptors = {}
        if out_features is not None or out_indices is not None:
            config.set_output_features_output_indices(out_features, out_indices)
        super().__init__(config)
        self.model = ERadioModel(config)
        self.num_features = [config.embed_dim, *config.channels, *([config.hidden_size] if config.neck else [])]
        last = self.stage_names.index(self.out_features[-1])  # stage n is number n; the neck is number 5
        if last < 5:
            self.model.neck = None
        if last < 4:
            self.model.norm = nn.Identity()
            del self.model.stages[last:], self.model.downsamples[max(last - 1, 0) :]
        self._keys_to_ignore_on_load_unexpected = [
            *(r"adaptors\.", r"(^|model\.)neck\.", r"(^|model\.)norm\."),
            *(rf"stages\.{index}\." for index in range(last, 4)),
            *(rf"downsamples\.{index}\." for index in range(max(last - 1, 0), 3)),
        ]
        self.post_init()
        self.built_with = weight_state(self.model)

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor, output_hidden_states: bool | int | list[int] | None = None, **kwargs
    ) -> BackboneOutput:
        """
        Args:
            pixel_values (batch_size, 3, height, width): in [0, 1], sides multiples of 32.

        Returns:
            `feature_maps`, one (batch_size, channels, height / stride, width / stride) per `out_features`;
            `hidden_states` on request: the maps of the stem and of the stages up to the last map.

        Raises:
            ValueError: `out_features` were changed to a map that was not built; hidden states that there are not.
        """
        self._warn_if_random()
        maps = self.model.stage_maps(pixel_values)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        wanted = check_layers(output_hidden_states, len(maps))
        hidden_states = tuple(one if layer in wanted else None for layer, one in enumerate(maps)) if wanted else None
        found = dict(zip(self.stage_names, maps, strict=False))
        if self.model.neck is not None:
            found["neck"] = self.model.neck(maps[3], maps[4])
        elif "stage4" in found:
            found["stage4"] = self.model.norm(found["stage4"])  # the features of a model without a neck
        missing = [name for name in self.out_features if name not in found]
        if missing:
            raise ValueError(
                f"out_features are {self.out_features}, but {missing[0]!r} was not built; build or load the backbone "
                "with these out_features."
            )
        return BackboneOutput(
            feature_maps=tuple(found[name] for name in self.out_features),  # type: ignore[arg-type]
            hidden_states=hidden_states,  # type: ignore[arg-type]
        )


ERadioForImageClassification.register_for_auto_class("AutoModelForImageClassification")
ERadioForSemanticSegmentation.register_for_auto_class("AutoModelForSemanticSegmentation")
ERadioBackbone.register_for_auto_class("AutoBackbone")
AutoBackbone.register(ERadioConfig, ERadioBackbone, exist_ok=True)
MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES["eradio_image_classification"] = ERadioForImageClassification.__name__
MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES["eradio_semantic_segmentation"] = ERadioForSemanticSegmentation.__name__
