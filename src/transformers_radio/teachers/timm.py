"""timm models as teachers."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from transformers_radio.modeling.errors_radio import OF_DAMAGED_FILES, one_line

from .base import Teacher, TeacherOutput, flatten_grid, grid_of, require, resolve_image_size
from .checkpoints import load_weights

# A local folder's weights, in the order in which timm itself looks for them.
FOLDER_WEIGHTS = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")


class TimmTeacher(Teacher):
    """Any timm image model.

    summary: what the model's classifier would read (`forward_head(..., pre_logits=True)`): the pooled features, or the
    normed class token where the model pools by it.
    features: `forward_features` without its prefix tokens, or its map flattened row by row.

    Args:
        model: the model; where it has a `set_input_size`, its position embeddings are resampled here.
        image_size: side of the input in pixels; None for the pretrained configuration's own. A convolutional model
            takes any as it is.

    Raises:
        ValueError: for an image_size that the model cannot take.
    """

    def __init__(self, model: Any, image_size: int | None = None):
        native = model.pretrained_cfg["input_size"][-1]
        patch_size = model.feature_info[-1]["reduction"]
        image_size = resolve_image_size(image_size, native, patch_size)
        if image_size != native:
            if hasattr(model, "set_input_size"):
                model.set_input_size(img_size=(image_size, image_size))
            elif model.pretrained_cfg.get("fixed_input_size", False):
                raise ValueError(f"image_size={image_size} is impossible for this model: timm fixes it at {native}")
        super().__init__(
            model,
            image_size=image_size,
            patch_size=patch_size,
            summary_dim=model.head_hidden_size,
            feature_dim=model.num_features,
            normalization=(model.pretrained_cfg["mean"], model.pretrained_cfg["std"]),
        )

    @classmethod
    def from_checkpoint(cls, checkpoint: str, image_size: int | None = None, dtype: str = "float32") -> Teacher:
        """As `Teacher.from_checkpoint`.

        Args:
            checkpoint: a timm model name ("vit_base_patch14_dinov2.lvd142m": its pretrained weights),
                "hf-hub:OWNER/NAME", a folder with timm's `config.json` and weights (also as "local-dir:PATH"), or
                "NAME:FILE" with a weights file.

        Raises:
            ValueError: for an unknown model, or weights that do not fit it or hold pickled code.
        """
        return cls(_load_timm(checkpoint), image_size).cast(dtype)

    def encode(self, pixel_values: torch.Tensor) -> TeacherOutput:
        features = self.model.forward_features(pixel_values)
        summary = self.model.forward_head(features, pre_logits=True)
        return TeacherOutput(summary, *patch_features(self.model, features))


def patch_features(model: nn.Module, features: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
    """What a timm model's `forward_features` returned (tokens, NCHW or NHWC) as row-major (B, h*w, C), and (h, w)."""
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
