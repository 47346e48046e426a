"""Any vision model of transformers without a teacher of its own: ViT, BEiT, Swin, ConvNeXt, ResNet, ..."""

import inspect
import math
from typing import Any

import torch
from transformers import MODEL_MAPPING, AutoConfig

from transformers_radio.teachers.base import (
    Normalization,
    Teacher,
    TeacherOutput,
    flatten_grid,
    grid_of,
    resolve_image_size,
)

from .dino import IMAGENET
from .pretrained import config_dict, load_pretrained, normalization_of


class VisionModelTeacher(Teacher):
    """The outputs of a model as AutoModel builds it.

    summary: the first of the tokens before the patches; without such tokens the pooled output, or else the mean of the
    features. features: patch tokens, or the last feature map, of the last hidden state.

    Args:
        model: one image through it shows its shapes, and that it takes this size.
        image_size: side of the input in pixels; None for the configuration's own, or 224 where it names none.
        normalization: (mean, std), by default ImageNet's.

    Raises:
        ValueError: for a model that takes no squares of this size, or has no last_hidden_state.
    """

    def __init__(self, model: Any, image_size: int | None = None, normalization: Normalization = IMAGENET):
        native = getattr(model.config, "image_size", 224)
        if not isinstance(native, int):
            raise ValueError(f"the model takes {native} images, but a teacher's input must be square")
        patch = getattr(model.config, "patch_size", 1)
        size = resolve_image_size(image_size, native, patch if isinstance(patch, int) else 1)
        can_interpolate = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
        options = {"interpolate_pos_encoding": True} if size != native and can_interpolate else {}
        with torch.no_grad():
            try:
                output = model(torch.zeros(1, 3, size, size, dtype=model.dtype, device=model.device), **options)
            except (ValueError, RuntimeError) as error:
                raise ValueError(f"the model does not take images of {size} x {size}: {error}") from error
        hidden = getattr(output, "last_hidden_state", None)  # (1, prefix + h*w, C) or (1, C, h, w)
        if hidden is None:
            raise ValueError(f"the model returns a {type(output).__name__}, which has no last_hidden_state")
        if hidden.ndim == 4:
            width, side, prefix = hidden.shape[1], hidden.shape[2], 0
        else:
            width, side = hidden.shape[2], size // patch if isinstance(patch, int) else 0
            if not 0 < side * side <= hidden.shape[1]:  # the patches were merged, or their size is not named
                side = math.isqrt(hidden.shape[1])
            prefix = hidden.shape[1] - side * side
        pooled = getattr(output, "pooler_output", None)
        # A pooler with weights is never read: many checkpoints lack them, and they would then be random.
        has_weights = any(name.startswith("pooler.") for name, _ in model.named_parameters())
        pooled = None if prefix or has_weights or pooled is None else pooled.flatten(1)
        super().__init__(
            model,
            image_size=size,
            patch_size=size // side,
            summary_dim=width if pooled is None else pooled.shape[1],
            feature_dim=width,
            normalization=normalization,
        )
        self.prefix, self.is_pooled, self.options = prefix, pooled is not None, options

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: str,
        image_size: int | None = None,
        dtype: str = "float32",
        trust_remote_code: bool = False,
        revision: str | None = None,
    ) -> Teacher:
        """As `Teacher.from_checkpoint`.

        Args:
            trust_remote_code: whether the code in the checkpoint's repository or folder may run, for a model that
                transformers lacks.
            revision: commit, tag or branch of the Hub; with code, name the commit that you have read.

        Raises:
            ValueError: for a model_type that transformers cannot open without the repository's code, or that is not
                that of a vision model.
        """
        model = _load(checkpoint, dtype, trust_remote_code, revision)
        return cls(model, image_size, normalization_of(checkpoint, revision))

    def encode(self, pixel_values: torch.Tensor) -> TeacherOutput:
        output = self.model(pixel_values, **self.options)
        if output.last_hidden_state.ndim == 4:
            features, grid = flatten_grid(output.last_hidden_state)
        else:
            features = output.last_hidden_state[:, self.prefix :]
            grid = grid_of(features)
        if self.prefix:
            summary = output.last_hidden_state[:, 0]
        else:
            summary = output.pooler_output.flatten(1) if self.is_pooled else features.mean(dim=1)
        return TeacherOutput(summary, features, grid)


def _load(checkpoint: str, dtype: str, trust_remote_code: bool, revision: str | None) -> Any:
    if not isinstance(trust_remote_code, bool):  # "false" would count as true
        raise ValueError(f"trust_remote_code={trust_remote_code!r} is neither true nor false")
    code: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision}
    try:
        config = AutoConfig.from_pretrained(checkpoint, **code)
    except ValueError as error:
        written = config_dict(checkpoint, revision)
        if trust_remote_code or "auto_map" not in written:
            raise ValueError(
                f"{checkpoint} has model_type {written.get('model_type')!r}, which transformers cannot open: "
                f"{str(error).splitlines()[0]}"
            ) from error
        raise ValueError(
            f"{checkpoint} has model_type {written.get('model_type')!r}, which only code of its own can open: read it "
            "and, if you trust it, set options: {trust_remote_code: true, revision: THE COMMIT THAT YOU READ}"
        ) from error
    kind: Any = MODEL_MAPPING[type(config)] if type(config) in MODEL_MAPPING else None
    if not trust_remote_code and getattr(kind, "main_input_name", None) != "pixel_values":
        raise ValueError(f"{checkpoint} has model_type {config.model_type!r}, which is no vision model")
    heads = ("classifier.", "lm_head.", "decoder.", "head.")
    model = load_pretrained(checkpoint, "AutoModel", dtype, heads, optional=("pooler.",), config=config, **code)
    if model.main_input_name != "pixel_values":
        raise ValueError(f"{checkpoint} is a {type(model).__name__}, which takes {model.main_input_name}, no images")
    return model
