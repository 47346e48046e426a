"""SAM's image encoder in transformers' format as a teacher."""

from typing import Any

import torch

from transformers_radio.teachers.base import Normalization, Teacher, TeacherOutput, flatten_grid, resolve_image_size
from transformers_radio.teachers.segment_anything import check_features, resize_positions

from .dino import IMAGENET
from .pretrained import load_pretrained, normalization_of


class SamTeacher(Teacher):
    """SAM's image encoder; it has no summary.

    Args:
        encoder: the `vision_encoder` of a SamVisionModel; its position table is resized here.
        image_size: side of the input in pixels; None for the configuration's own (1024). Other sizes are handled as in
            `SegmentAnythingTeacher`.
        normalization: (mean, std), by default ImageNet's.
        features: "trunk", the output of the last block before the neck, which the paper distills, or "neck", what
            SAM's mask decoder reads.
    """

    def __init__(
        self,
        encoder: Any,
        image_size: int | None = None,
        normalization: Normalization = IMAGENET,
        features: str = "trunk",
    ):
        check_features(features)
        config = encoder.config
        image_size = resolve_image_size(image_size, config.image_size, config.patch_size)
        if image_size != config.image_size:
            encoder.pos_embed = resize_positions(encoder.pos_embed, image_size // config.patch_size)
            encoder.patch_embed.image_size = (image_size, image_size)
        super().__init__(
            encoder,
            image_size=image_size,
            patch_size=config.patch_size,
            summary_dim=None,
            feature_dim=config.hidden_size if features == "trunk" else config.output_channels,
            normalization=normalization,
        )
        self.features = features

    @classmethod
    def from_checkpoint(
        cls, checkpoint: str, image_size: int | None = None, dtype: str = "float32", features: str = "trunk"
    ) -> Teacher:
        check_features(features)  # before the weights are read
        unused = ("prompt_encoder.", "mask_decoder.", "shared_image_embedding.")
        model = load_pretrained(checkpoint, "SamVisionModel", dtype, unused)
        return cls(model.vision_encoder, image_size, normalization_of(checkpoint), features)

    def encode(self, pixel_values: torch.Tensor) -> TeacherOutput:
        encoder = self.model
        hidden = encoder.patch_embed(pixel_values) + encoder.pos_embed  # (B, h, w, C)
        for layer in encoder.layers:
            hidden = layer(hidden)
        # The neck takes (B, h, w, C) and returns (B, C', h, w).
        feature_map = hidden.permute(0, 3, 1, 2) if self.features == "trunk" else encoder.neck(hidden)
        return TeacherOutput(None, *flatten_grid(feature_map))
