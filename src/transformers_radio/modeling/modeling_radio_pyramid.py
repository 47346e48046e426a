"""A RADIO student with ViTDet's simple pyramid as the backbone of transformers' detectors and segmenters."""

import copy
from collections.abc import Sequence

import torch
from transformers import AutoBackbone
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import BackboneOutput
from transformers.utils import can_return_tuple

from .configuration_radio_pyramid import RadioPyramidConfig
from .modeling_radio import RadioModel
from .parts_radio import RadioPart, weight_state
from .pyramid_radio import RadioSimplePyramid


class RadioPyramidBackbone(BackboneMixin, RadioPart):
    """Feature maps at the strides of its [`RadioPyramidConfig`], all from the student's last features, as in ViTDet.

    The input is in [0, 1], not normalized, with sides that are multiples of `min_resolution_step` and of the largest
    stride. `from_pretrained` also takes a student's folder; the pyramid is then new.
    """

    config_class = RadioPyramidConfig  # type: ignore[assignment]

    def __init__(self, config):
        config = copy.deepcopy(RadioPyramidConfig.adopt(config))
        config.adaptors = {}
        super().__init__(config)
        self.model = RadioModel(config)
        self.pyramid = RadioSimplePyramid(config.hidden_size, config.patch_size, config.strides, config.pyramid_size)
        self.num_features = [config.pyramid_size] * len(config.strides)
        self.post_init()
        self.built_with = weight_state(self.model)

    @classmethod
    def from_pretrained(cls, *args, allow_missing: Sequence[str] = ("pyramid.",), **kwargs):
        """As [`RadioModel.from_pretrained`]; only the pyramid may be missing, and transformers reports it as new."""
        return super().from_pretrained(*args, allow_missing=allow_missing, **kwargs)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        output_hidden_states: bool | int | list[int] | None = None,
        output_attentions: bool | None = None,
        pixel_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> BackboneOutput:
        """
        Args:
            pixel_values (batch_size, 3, height, width): in [0, 1].
            pixel_mask (batch_size, height, width): 1 on the image, 0 on padding; see [`RadioModel`].

        Returns:
            `feature_maps`, one (batch_size, pyramid_size, height / stride, width / stride) per `out_features`;
            `hidden_states` on request: the whole sequences (batch_size, prefix + patches, hidden_size).

        Raises:
            ValueError: Sides that are not multiples of the largest stride, or an input that the student does not take.
        """
        self.model.check_images(pixel_values)
        height, width = pixel_values.shape[-2:]
        largest = self.config.strides[-1]
        if height % largest or width % largest:
            raise ValueError(
                f"pixel_values are {height}x{width} pixels, but the largest stride is {largest}: resize or pad both "
                "sides to its multiples."
            )
        outputs, wanted = self.run_student(pixel_values, output_hidden_states, output_attentions, pixel_mask)
        maps = self.pyramid(self.model.features_to_grid(outputs.features, height, width))
        found = dict(zip(self.stage_names, maps, strict=True))
        hidden_states = None
        if wanted:
            hidden_states = tuple(
                tokens if layer in wanted else None for layer, tokens in enumerate(outputs.hidden_states)
            )
        return BackboneOutput(
            feature_maps=tuple(found[name] for name in self.out_features),  # type: ignore[arg-type]
            hidden_states=hidden_states,  # type: ignore[arg-type]
            attentions=outputs.attentions,
        )


RadioPyramidBackbone.register_for_auto_class("AutoBackbone")
AutoBackbone.register(RadioPyramidConfig, RadioPyramidBackbone, exist_ok=True)
