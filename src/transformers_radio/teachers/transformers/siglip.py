"""SigLIP and SigLIP2 of transformers: their image towers as teachers, and their text towers."""

import string
from typing import Any

import torch
from transformers import Siglip2TextModel, Siglip2VisionModel, SiglipTextModel, SiglipVisionModel
from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD

from transformers_radio.teachers.base import Normalization, Teacher, TeacherOutput, grid_of, resolve_image_size
from transformers_radio.teachers.text import TextEncoder

from .pretrained import load_pretrained, load_tokenizer, normalization_of

HALF = (IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD)
PUNCTUATION = str.maketrans("", "", string.punctuation)
SHARED = ("logit_scale", "logit_bias")  # weights that belong to neither tower


class SiglipTeacher(Teacher):
    """SigLIP and the fixed-resolution SigLIP2.

    summary: attention-pooling output. features: final-normed patch tokens.

    Args:
        model: a SiglipVisionModel; its position embeddings are interpolated at every forward.
        image_size: side of the input in pixels; None for the configuration's own.
        normalization: (mean, std), by default 0.5 for both.
    """

    has_text = True
    vision_model: Any = SiglipVisionModel
    text_model: Any = SiglipTextModel

    def __init__(self, model: Any, image_size: int | None = None, normalization: Normalization = HALF):
        config = model.config
        super().__init__(
            model,
            image_size=resolve_image_size(image_size, self.native_size(config), config.patch_size),
            patch_size=config.patch_size,
            summary_dim=config.hidden_size,
            feature_dim=config.hidden_size,
            normalization=normalization,
        )

    @staticmethod
    def native_size(config: Any) -> int:
        """Side in pixels of the image whose grid is the position table."""
        return config.image_size

    @classmethod
    def from_checkpoint(
        cls, checkpoint: str, image_size: int | None = None, dtype: str = "float32", revision: str | None = None
    ) -> Teacher:
        """As `Teacher.from_checkpoint`; `revision` is a commit, tag or branch of the Hub."""
        model = load_pretrained(checkpoint, cls.vision_model, dtype, ("text_model.", *SHARED), revision=revision)
        return cls(model, image_size, normalization_of(checkpoint, revision))

    @classmethod
    def text_encoder(cls, checkpoint: str) -> TextEncoder:
        config = cls.text_model.config_class.from_pretrained(checkpoint)
        model = load_pretrained(checkpoint, cls.text_model, "float32", ("vision_model.", *SHARED), config=config)
        return SiglipTextEncoder(model, load_tokenizer(checkpoint))

    def encode(self, pixel_values: torch.Tensor) -> TeacherOutput:
        output = self.model(pixel_values, interpolate_pos_encoding=True)
        return TeacherOutput(output.pooler_output, output.last_hidden_state, grid_of(output.last_hidden_state))


class Siglip2Teacher(SiglipTeacher):
    """SigLIP2 NaFlex, which reads patches of any grid and resizes its position table to it.

    The same outputs as `SiglipTeacher`, of a Siglip2VisionModel. Its own image_size is the one whose grid is the
    position table (256 for the released 16 x 16 tables at patch 16).
    """

    vision_model: Any = Siglip2VisionModel
    text_model: Any = Siglip2TextModel

    @staticmethod
    def native_size(config: Any) -> int:
        return round(config.num_patches**0.5) * config.patch_size

    def encode(self, pixel_values: torch.Tensor) -> TeacherOutput:
        p = self.patch_size
        batch, _, height, width = pixel_values.shape
        h, w = height // p, width // p
        # (B, C, h*p, w*p) -> (B, C, h, p, w, p) -> (B, h, w, p, p, C) -> (B, h*w, p*p*C): pixels before channels
        patches = pixel_values.unflatten(3, (w, p)).unflatten(2, (h, p)).permute(0, 2, 4, 3, 5, 1)
        patches = patches.flatten(1, 2).flatten(2)
        output = self.model(
            patches,
            pixel_attention_mask=torch.ones(batch, h * w, dtype=torch.int64, device=patches.device),
            spatial_shapes=torch.tensor([[h, w]] * batch, device=patches.device),
        )
        return TeacherOutput(output.pooler_output, output.last_hidden_state, (h, w))


class SiglipTextEncoder(TextEncoder):
    """Texts are canonicalized and padded on the right to the length of the position table (64), and the padding is not
    masked: both SigLIPs were trained so, and SigLIP2's tokenizer in transformers does not do it (it keeps punctuation
    and pads on the left)."""

    def encode(self, texts: list[str]) -> torch.Tensor:
        tokens = self.tokenizer(
            [canonicalize_text(text) for text in texts],
            padding="max_length",
            padding_side="right",
            truncation=True,
            max_length=self.model.config.max_position_embeddings,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_tensors="pt",
        )
        return self.model(**tokens.to(self.model.device)).pooler_output


def canonicalize_text(text: str) -> str:
    """Lower case, underscores as spaces, no ASCII punctuation, one space between words: SigLIP's training texts."""
    return " ".join(text.replace("_", " ").translate(PUNCTUATION).lower().split())
