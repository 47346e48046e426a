"""DINOv2, with or without registers, and DINOv3 (ViT) of transformers as teachers."""

from typing import Any

import torch
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from transformers_radio.teachers.base import Normalization, Teacher, TeacherOutput, grid_of, resolve_image_size

from .pretrained import load_pretrained, normalization_of

IMAGENET = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


class DinoTeacher(Teacher):
    """summary: final-normed class token. features: final-normed patch tokens.

    Args:
        model: a Dinov2Model, Dinov2WithRegistersModel or DINOv3ViTModel.
        image_size: side of the input in pixels; None for the one that the configuration names (518 for the released
            DINOv2; the paper feeds DINOv2 at 224).
        normalization: (mean, std), by default ImageNet's.
    """

    def __init__(self, model: Any, image_size: int | None = None, normalization: Normalization = IMAGENET):
        config = model.config
        super().__init__(
            model,
            image_size=resolve_image_size(image_size, config.image_size, config.patch_size),
            patch_size=config.patch_size,
            summary_dim=config.hidden_size,
            feature_dim=config.hidden_size,
            normalization=normalization,
        )

    @classmethod
    def from_checkpoint(
        cls, checkpoint: str, image_size: int | None = None, dtype: str = "float32", revision: str | None = None
    ) -> Teacher:
        """As `Teacher.from_checkpoint`; `revision` is a commit, tag or branch of the Hub."""
        model = load_pretrained(checkpoint, "AutoModel", dtype, unused=("classifier.",), revision=revision)
        return cls(model, image_size, normalization_of(checkpoint, revision))

    def encode(self, pixel_values: torch.Tensor) -> TeacherOutput:
        tokens = self.model(pixel_values).last_hidden_state  # (B, 1 + registers + h*w, C)
        patches = tokens[:, 1 + getattr(self.model.config, "num_register_tokens", 0) :]
        return TeacherOutput(tokens[:, 0], patches, grid_of(patches))
