"""CLIP of transformers: its image tower as a teacher, and its text tower."""

from typing import Any

import torch
from transformers import CLIPTextConfig, CLIPVisionConfig
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from transformers_radio.teachers.base import Normalization, Teacher, TeacherOutput, grid_of, resolve_image_size
from transformers_radio.teachers.text import TextEncoder

from .pretrained import config_dict, load_pretrained, load_tokenizer, normalization_of

OPENAI_CLIP = (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)


class ClipTeacher(Teacher):
    """CLIP's image tower.

    summary: pooled, final-normed and projected. features: patch tokens of the last block, before the final norm.

    Args:
        model: a CLIPVisionModelWithProjection; its position embeddings are interpolated at every forward.
        image_size: side of the input in pixels; None for the configuration's own.
        normalization: (mean, std), by default OpenAI's.
    """

    has_text = True

    def __init__(self, model: Any, image_size: int | None = None, normalization: Normalization = OPENAI_CLIP):
        config = model.config
        super().__init__(
            model,
            image_size=resolve_image_size(image_size, config.image_size, config.patch_size),
            patch_size=config.patch_size,
            summary_dim=config.projection_dim,
            feature_dim=config.hidden_size,
            normalization=normalization,
        )

    @classmethod
    def from_checkpoint(cls, checkpoint: str, image_size: int | None = None, dtype: str = "float32") -> Teacher:
        """A full CLIP checkpoint, or a vision-only one with projection; otherwise as `Teacher.from_checkpoint`."""
        config = _config(CLIPVisionConfig, checkpoint)
        unused = ("text_model.", "text_projection.", "logit_scale")
        model = load_pretrained(checkpoint, "CLIPVisionModelWithProjection", dtype, unused, config=config)
        return cls(model, image_size, normalization_of(checkpoint))

    @classmethod
    def text_encoder(cls, checkpoint: str) -> TextEncoder:
        config = _config(CLIPTextConfig, checkpoint)
        unused = ("vision_model.", "visual_projection.", "logit_scale")
        model = load_pretrained(checkpoint, "CLIPTextModelWithProjection", "float32", unused, config=config)
        return ClipTextEncoder(model, load_tokenizer(checkpoint))

    def encode(self, pixel_values: torch.Tensor) -> TeacherOutput:
        output = self.model(pixel_values, interpolate_pos_encoding=True)
        patches = output.last_hidden_state[:, 1:]
        return TeacherOutput(output.image_embeds, patches, grid_of(patches))


class ClipTextEncoder(TextEncoder):
    """Texts go to the tokenizer as they are; the padding is masked."""

    def encode(self, texts: list[str]) -> torch.Tensor:
        length = self.model.config.max_position_embeddings
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        return self.model(**tokens.to(self.model.device)).text_embeds


def _config(config_class: Any, checkpoint: str) -> Any:
    """One tower's configuration. A full CLIP keeps the width of its projections outside of its towers' parts."""
    config = config_class.from_pretrained(checkpoint)
    config.projection_dim = config_dict(checkpoint).get("projection_dim", config.projection_dim)
    return config
