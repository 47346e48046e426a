"""InternViT as a teacher: in transformers' format, or the original one, whose code does not run on transformers 5."""

from typing import Any

import torch
from transformers import InternVLVisionConfig, InternVLVisionModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Chunk, WeightConverter, WeightRenaming

from transformers_radio.teachers.base import Normalization, Teacher, TeacherOutput, grid_of, resolve_image_size

from .dino import IMAGENET
from .pretrained import config_dict, load_pretrained, normalization_of

# The configuration: original name -> transformers', and what the original means where it names none (the 6B's).
FIELDS = {
    "hidden_size": ("hidden_size", 3200),
    "num_hidden_layers": ("num_hidden_layers", 48),
    "num_attention_heads": ("num_attention_heads", 25),
    "intermediate_size": ("intermediate_size", 12800),
    "hidden_act": ("hidden_act", "gelu"),
    "image_size": ("image_size", 224),
    "patch_size": ("patch_size", 14),
    "num_channels": ("num_channels", 3),
    "norm_type": ("norm_type", "rms_norm"),
    "layer_norm_eps": ("layer_norm_eps", 1e-6),
    "qkv_bias": ("attention_bias", False),
    "qk_normalization": ("use_qk_norm", True),
}
# The weights: pattern of the original names -> transformers'.
NAMES = {
    r"^vision_model\.": "",
    "embeddings.class_embedding": "embeddings.cls_token",
    "embeddings.position_embedding": "embeddings.position_embeddings",
    "embeddings.patch_embedding": "embeddings.patch_embeddings.projection",
    "encoder.layers": "encoder.layer",
    r"\.norm1": ".layernorm_before",
    r"\.norm2": ".layernorm_after",
    r"\.ls1": ".lambda_1",
    r"\.ls2": ".lambda_2",
    "attn.proj": "attention.projection_layer",
    "attn.q_norm": "attention.q_norm",
    "attn.k_norm": "attention.k_norm",
}


class InternVitTeacher(Teacher):
    """InternViT alone, or as the vision tower of an InternVL, whose language model is not read.

    summary: class token, features: patch tokens, both of the last hidden state.

    Args:
        model: an InternVLVisionModel; its position embeddings are interpolated at every forward.
        image_size: side of the input in pixels; None for the configuration's own.
        normalization: (mean, std), by default ImageNet's.
    """

    def __init__(self, model: Any, image_size: int | None = None, normalization: Normalization = IMAGENET):
        config = model.config
        (native, _), (patch_size, _) = config.image_size, config.patch_size
        super().__init__(
            model,
            image_size=resolve_image_size(image_size, native, patch_size),
            patch_size=patch_size,
            summary_dim=config.hidden_size,
            feature_dim=config.hidden_size,
            normalization=normalization,
        )

    @classmethod
    def from_checkpoint(cls, checkpoint: str, image_size: int | None = None, dtype: str = "float32") -> Teacher:
        return cls(_load(checkpoint, dtype), image_size, normalization_of(checkpoint))

    def encode(self, pixel_values: torch.Tensor) -> TeacherOutput:
        tokens = self.model(pixel_values).last_hidden_state  # (B, 1 + h*w, C)
        return TeacherOutput(tokens[:, 0], tokens[:, 1:], grid_of(tokens[:, 1:]))


def original_config(written: dict[str, Any]) -> InternVLVisionConfig:
    """transformers' configuration for the fields of an original one; what these leave out is as in the 6B."""
    fields = {name: written.get(original, default) for original, (name, default) in FIELDS.items()}
    return InternVLVisionConfig(**fields, use_mean_pooling=True)  # no norm after the last block


def _load(checkpoint: str, dtype: str) -> Any:
    """An InternVLVisionModel with the weights of any of the four kinds of checkpoint."""
    written = config_dict(checkpoint)
    if written["model_type"] in ("internvl_vision", "internvl"):
        languages = ("model.language_model.", "language_model.", "lm_head.")
        unused = (*languages, "model.multi_modal_projector.", "multi_modal_projector.")
        config = InternVLVisionConfig.from_pretrained(checkpoint)
        tower = {r"^(model\.)?vision_tower\.": ""}
        return load_pretrained(checkpoint, "InternVLVisionModel", dtype, unused, config=config, key_mapping=tower)
    # "internvl_chat" holds the tower's configuration, "intern_vit_6b" is one
    config = original_config(written.get("vision_config", written))
    return load_pretrained(checkpoint, _original_model(), dtype, ("language_model.", "mlp1."), config=config)


def _original_model() -> Any:
    """transformers' model, reading the original names, under which queries, keys and values are one matrix."""

    class OriginalInternVit(InternVLVisionModel):
        pass

    split = [f"attention.{part}_proj" for part in "qkv"]
    conversions: list[WeightConverter | WeightRenaming] = [
        *(WeightRenaming(original, name) for original, name in NAMES.items()),
        WeightConverter("attn.qkv", split, operations=[Chunk(dim=0)]),
    ]
    register_checkpoint_conversion_mapping(OriginalInternVit.__name__, conversions, overwrite=True)
    return OriginalInternVit
