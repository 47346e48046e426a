"""timm models as teachers."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from transformers_radio.modeling.errors_radio import OF_DAMAGED_FILES, one_line

from .base import (
    Teacher,
    TeacherOutput,
    flatten_grid,
    grid_of,
    require,
    resolve_image_size,
)
from .checkpoints import load_weights

# In the order in which timm itself looks for a local folder's weights.
FOLDER_WEIGHTS = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")


class TimmTeacher(Teacher):
    """Any timm image model.

    summary: what the model's classifier would read (`forward_head(..., pre_logits=True)`): the pooled features, or the
    normed class token where the model pools by it.
    features: `forward_features` without its prefix tokens, or its map flattened row by row.

    Args:
        checkpoint: a timm model name ("vit_base_patch14_dinov2.lvd142m": its pretrained weights), "hf-hub:OWNER/NAME",
            a folder with timm's `config.json` and weights (also as "local-dir:PATH"), or "NAME:FILE" with a weights
            file.
        image_size: None for the pretrained config's own. Other sizes go through the model's `set_input_size` (position
            embeddings resampled by timm); a convolutional model takes them as they are.
        dtype: of weights and activations.

    Raises:
        ValueError: for an unknown model, weights that do not fit it or hold pickled code, or an impossible image_size.
    """

    def __init__(self, checkpoint: str, image_size: int | None = None, dtype: str = "float32"):
        model = _load_timm(checkpoint)
        native = model.pretrained_cfg["input_size"][-1]
        patch_size = model.feature_info[-1]["reduction"]
        image_size = resolve_image_size(image_size, native, patch_size)
        if image_size != native:
            if hasattr(model, "set_input_size"):
                model.set_input_size(img_size=(image_size, image_size))
            elif model.pretrained_cfg.get("fixed_input_size", False):
                raise ValueError(f"image_size={image_size} is impossible for {checkpoint}: timm fixes it at {native}")
        super().__init__(
            model,
            image_size=image_size,
            patch_size=patch_size,
            summary_dim=model.head_hidden_size,
            feature_dim=model.num_features,
            mean=model.pretrained_cfg["mean"],
            std=model.pretrained_cfg["std"],
            dtype=dtype,
        )

    def encode(self, pixel_values: torch.Tensor) -> TeacherOutput:
        features = self.model.forward_features(pixel_values)
        summary = self.model.forward_head(features, pre_logits=True)
        return TeacherOutput(summary, *patch_features(self.model, features))


def patch_features(model: nn.Module, features: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
    """Row-major (B, h*w, C) and (h, w) of what a timm model's `forward_features` returned (tokens, NCHW or NHWC)."""
    if features.ndim == 3:
        patches = features[:, getattr(model, "num_prefix_tokens", 0) :]
        return patches, grid_of(patches)
    if getattr(model, "output_fmt", "NCHW") == "NHWC":
        features = features.permute(0, 3, 1, 2)  # (B, h, w, C) -> (B, C, h, w)
    return flatten_grid(features)


def _load_timm(checkpoint: str) -> Any:
    """The model on the CPU in float32, strictly loaded; local files go through our own loader, which runs no code."""
    timm = require("timm")
    overlay = None
    if checkpoint.startswith("hf-hub:"):
        name = checkpoint
    elif checkpoint.startswith("local-dir:") or Path(checkpoint).is_dir():
        folder = Path(checkpoint.removeprefix("local-dir:"))
        name = f"local-dir:{folder}"
        found = [folder / file for file in FOLDER_WEIGHTS if (folder / file).is_file()]
        if not found:
            raise ValueError(f"{folder} holds no weights: expected one of {', '.join(FOLDER_WEIGHTS)}")
        overlay = {"state_dict": load_weights(found[0])}
    else:
        name, _, weights = checkpoint.partition(":")
        if not timm.is_model(name):
            raise ValueError(f"timm knows no model {name!r}: see timm.list_models()")
        overlay = {"state_dict": load_weights(weights)} if weights else None
    try:
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
    except (OSError, ValueError, *OF_DAMAGED_FILES) as error:
        raise ValueError(f"timm could not load {checkpoint}: {one_line(error)}") from error
