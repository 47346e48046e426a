"""Text towers of transformers' CLIP, SigLIP and SigLIP2 for zero-shot classification, without their image towers."""

import string
from typing import Any

import torch
from torch import nn

from transformers_radio.modeling.errors_radio import OF_DAMAGED_FILES, naming_checkpoint, one_line

from .checkpoints import resolve_checkpoint
from .pretrained import config_dict, load_pretrained

TEXT_BATCH = 256
PUNCTUATION = str.maketrans("", "", string.punctuation)
CLIP_TYPES = ("clip", "clip_text_model")
# model_type -> (configuration of the text tower, its class)
TOWERS = {
    "clip": ("CLIPTextConfig", "CLIPTextModelWithProjection"),
    "clip_text_model": ("CLIPTextConfig", "CLIPTextModelWithProjection"),
    "siglip": ("SiglipTextConfig", "SiglipTextModel"),  # also SigLIP2 of one fixed resolution
    "siglip_text_model": ("SiglipTextConfig", "SiglipTextModel"),
    "siglip2": ("Siglip2TextConfig", "Siglip2TextModel"),  # NaFlex
    "siglip2_text_model": ("Siglip2TextConfig", "Siglip2TextModel"),
}


class TransformersTextEncoder(nn.Module):
    """A text tower with its tokenizer: N texts -> (N, dim) float32, not normalised.

    CLIP's texts go to its tokenizer as they are. SigLIP's are canonicalised first and padded on the right to the
    length of the position table (64), and the padding is not masked: so both were trained, and SigLIP2's tokenizer in
    transformers does not do it (it keeps punctuation and pads on the left).
    """

    def __init__(self, model: nn.Module, tokenizer: Any):
        super().__init__()
        self.model: Any = model.requires_grad_(False)
        self.tokenizer = tokenizer
        config: Any = model.config
        self.is_clip = config.model_type in CLIP_TYPES
        self.eval()

    @torch.no_grad()
    def forward(self, texts: list[str]) -> torch.Tensor:
        if isinstance(texts, str) or not texts:
            raise ValueError(f"texts must be a list of at least one string, got {texts!r}")
        embeddings = []
        for start in range(0, len(texts), TEXT_BATCH):
            tokens = self.tokenize(texts[start : start + TEXT_BATCH]).to(self.model.device)
            output = self.model(**tokens)
            embeddings.append((output.text_embeds if self.is_clip else output.pooler_output).float())
        return torch.cat(embeddings)

    def tokenize(self, texts: list[str]) -> Any:
        """What the tower reads: ids (N, length), for CLIP with the mask of the padding."""
        length = self.model.config.max_position_embeddings
        if self.is_clip:
            return self.tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        return self.tokenizer(
            [canonicalize_text(text) for text in texts],
            padding="max_length",
            padding_side="right",
            truncation=True,
            max_length=length,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_tensors="pt",
        )


def canonicalize_text(text: str) -> str:
    """Lower case, underscores as spaces, no ASCII punctuation, one space between words: SigLIP's training texts."""
    return " ".join(text.replace("_", " ").translate(PUNCTUATION).lower().split())


def load_transformers_text_encoder(checkpoint: str) -> TransformersTextEncoder:
    """The text tower of a CLIP, SigLIP or SigLIP2 checkpoint (Hub id or folder), on the CPU in float32.

    The image tower is left in its file. Call the result with a list of texts: their embeddings (N, dim), float32 and
    not L2-normalised, are in the space of the same checkpoint's image summaries.

    Raises:
        ValueError: for a model_type without such a tower, missing weights, or a checkpoint without a tokenizer.
    """
    import transformers

    checkpoint = resolve_checkpoint(checkpoint)
    config = config_dict(checkpoint)
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in TOWERS:
        raise ValueError(f"{checkpoint} has model_type {model_type!r}; text towers exist for {', '.join(TOWERS)}")
    config_name, class_name = TOWERS[model_type]
    unused = ("vision_model.", "visual_projection.", "logit_scale", "logit_bias")
    with naming_checkpoint(checkpoint):
        text_config = getattr(transformers, config_name).from_pretrained(checkpoint)
        if model_type == "clip":  # a full CLIP keeps the width of its projections outside the text part
            text_config.projection_dim = config.get("projection_dim", text_config.projection_dim)
        model = load_pretrained(checkpoint, class_name, "float32", unused, text_config)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
    except (OSError, ValueError, ImportError, *OF_DAMAGED_FILES) as error:
        raise ValueError(
            f"{checkpoint} has no tokenizer that can be loaded ({one_line(error)}): save the checkpoint's own into "
            "the same folder (AutoTokenizer ... .save_pretrained)"
        ) from error
    return TransformersTextEncoder(model, tokenizer)
