"""transformers models as teachers: CLIP, DINOv2/v3, SigLIP/2, InternViT, SAM, RADIO students, any other."""

import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from transformers_radio.modeling.errors_radio import one_line

from .base import (
    Teacher,
    TeacherOutput,
    check_options,
    flatten_grid,
    grid_of,
    resolve_image_size,
)
from .intern_vit import InternVitTeacher
from .pretrained import config_dict, load_pretrained, normalization
from .segment_anything import check_features, resize_positions


class ClipTeacher(Teacher):
    """CLIP's image tower, from a full CLIP checkpoint or a vision-only one with projection.

    summary: pooled, final-normed and projected. features: patch tokens of the last block, before the final norm.
    """

    def __init__(self, checkpoint: str, image_size: int | None = None, dtype: str = "float32"):
        from transformers import CLIPVisionConfig

        config = CLIPVisionConfig.from_pretrained(checkpoint)
        # A full CLIP keeps the width of its projections outside the vision part of its configuration.
        config.projection_dim = config_dict(checkpoint).get("projection_dim", config.projection_dim)
        unused = ("text_model.", "text_projection.", "logit_scale")
        model = load_pretrained(checkpoint, "CLIPVisionModelWithProjection", dtype, unused, config)
        super().__init__(
            model,
            image_size=resolve_image_size(image_size, model.config.image_size, model.config.patch_size),
            patch_size=model.config.patch_size,
            summary_dim=model.config.projection_dim,
            feature_dim=model.config.hidden_size,
            **normalization(checkpoint),
            dtype=dtype,
        )

    def encode(self, pixel_values: torch.Tensor) -> TeacherOutput:
        output = self.model(pixel_values, interpolate_pos_encoding=True)
        patches = output.last_hidden_state[:, 1:]
        return TeacherOutput(output.image_embeds, patches, grid_of(patches))


class DinoTeacher(Teacher):
    """DINOv2 with or without registers, and DINOv3 (ViT).

    summary: final-normed class token. features: final-normed patch tokens. Without `image_size` the input is the size
    that the configuration names (518 for the released DINOv2); the paper feeds DINOv2 at 224.
    """

    def __init__(self, checkpoint: str, image_size: int | None = None, dtype: str = "float32"):
        model = load_pretrained(checkpoint, "AutoModel", dtype, unused=("classifier.",))
        super().__init__(
            model,
            image_size=resolve_image_size(image_size, model.config.image_size, model.config.patch_size),
            patch_size=model.config.patch_size,
            summary_dim=model.config.hidden_size,
            feature_dim=model.config.hidden_size,
            **normalization(checkpoint),
            dtype=dtype,
        )

    def encode(self, pixel_values: torch.Tensor) -> TeacherOutput:
        tokens = self.model(pixel_values).last_hidden_state  # (B, 1 + registers + h*w, C)
        patches = tokens[:, 1 + getattr(self.model.config, "num_register_tokens", 0) :]
        return TeacherOutput(tokens[:, 0], patches, grid_of(patches))


class SiglipTeacher(Teacher):
    """SigLIP and the fixed-resolution SigLIP2.

    summary: attention-pooling output. features: final-normed patch tokens.
    """

    def __init__(self, checkpoint: str, image_size: int | None = None, dtype: str = "float32"):
        unused = ("text_model.", "logit_scale", "logit_bias")
        model = load_pretrained(checkpoint, "SiglipVisionModel", dtype, unused)
        super().__init__(
            model,
            image_size=resolve_image_size(image_size, model.config.image_size, model.config.patch_size),
            patch_size=model.config.patch_size,
            summary_dim=model.config.hidden_size,
            feature_dim=model.config.hidden_size,
            **normalization(checkpoint),
            dtype=dtype,
        )

    def encode(self, pixel_values: torch.Tensor) -> TeacherOutput:
        output = self.model(pixel_values, interpolate_pos_encoding=True)
        return TeacherOutput(output.pooler_output, output.last_hidden_state, grid_of(output.last_hidden_state))


class Siglip2Teacher(Teacher):
    """SigLIP2 NaFlex, which reads patches of any grid and resizes its position table to it.

    summary: attention-pooling output. features: final-normed patch tokens. The native image_size is the one whose grid
    is the position table (256 for the released 16 x 16 tables at patch 16).
    """

    def __init__(self, checkpoint: str, image_size: int | None = None, dtype: str = "float32"):
        unused = ("text_model.", "logit_scale", "logit_bias")
        model = load_pretrained(checkpoint, "Siglip2VisionModel", dtype, unused)
        native = round(model.config.num_patches**0.5) * model.config.patch_size
        super().__init__(
            model,
            image_size=resolve_image_size(image_size, native, model.config.patch_size),
            patch_size=model.config.patch_size,
            summary_dim=model.config.hidden_size,
            feature_dim=model.config.hidden_size,
            **normalization(checkpoint),
            dtype=dtype,
        )

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


class SamTeacher(Teacher):
    """SAM's image encoder; it has no summary.

    features: "trunk", the output of the last block before the neck (what the paper distils), or "neck", what SAM's
    mask decoder reads. Other sizes than the checkpoint's own are handled as in `SegmentAnythingTeacher`.
    """

    def __init__(
        self, checkpoint: str, image_size: int | None = None, dtype: str = "float32", features: str = "trunk"
    ):
        check_features(features)
        unused = ("prompt_encoder.", "mask_decoder.", "shared_image_embedding.")
        encoder = load_pretrained(checkpoint, "SamVisionModel", dtype, unused).vision_encoder
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
            **normalization(checkpoint),
            dtype=dtype,
        )
        self.features = features

    def encode(self, pixel_values: torch.Tensor) -> TeacherOutput:
        encoder = self.model
        hidden = encoder.patch_embed(pixel_values) + encoder.pos_embed  # (B, h, w, C)
        for layer in encoder.layers:
            hidden = layer(hidden)
        # The neck takes (B, h, w, C) and returns (B, C', h, w).
        feature_map = hidden.permute(0, 3, 1, 2) if self.features == "trunk" else encoder.neck(hidden)
        return TeacherOutput(None, *flatten_grid(feature_map))


class RadioTeacher(Teacher):
    """A trained RADIO student as the teacher of another one; it normalises its input itself.

    summary and features: the backbone's, or with `adaptor` those in that teacher's space.
    """

    def __init__(
        self, checkpoint: str, image_size: int | None = None, dtype: str = "float32", adaptor: str | None = None
    ):
        from transformers_radio.modeling import RadioModel

        model = load_pretrained(checkpoint, RadioModel, dtype)
        config = model.config
        summary_dim: int | None = config.summary_dim
        feature_dim = config.hidden_size
        if adaptor is not None:
            if adaptor not in config.adaptors:
                raise ValueError(
                    f"adaptor={adaptor!r} is unknown: {checkpoint} has {', '.join(config.adaptors) or 'no adaptors'}"
                )
            summary_dim = config.adaptors[adaptor]["summary_dim"]
            feature_dim = config.adaptors[adaptor]["feature_dim"]
            if feature_dim is None:
                raise ValueError(f"adaptor {adaptor!r} of {checkpoint} has no features, which a teacher must give")
        super().__init__(
            model,
            image_size=resolve_image_size(image_size, config.preferred_resolution, model.min_resolution_step),
            patch_size=model.patch_size,
            summary_dim=summary_dim,
            feature_dim=feature_dim,
            mean=(0.0, 0.0, 0.0),
            std=(1.0, 1.0, 1.0),
            dtype=dtype,
        )
        self.adaptor = adaptor

    def encode(self, pixel_values: torch.Tensor) -> TeacherOutput:
        if self.adaptor is None:
            output = self.model(pixel_values, adaptors=[])
        else:
            output = self.model(pixel_values, adaptors=[self.adaptor]).adaptors[self.adaptor]
        return TeacherOutput(output.summary, output.features, grid_of(output.features))


class VisionModelTeacher(Teacher):
    """Any other vision model of transformers, as its AutoModel leaves the image: ViT, Swin, ConvNeXt, ResNet, ...

    summary: the first of the tokens before the patches; without such tokens the pooled output, or else the mean of the
    features. features: patch tokens, or the last feature map, of the last hidden state.

    Args:
        trust_remote_code: runs the code in the checkpoint's repository or folder, if transformers lacks the model.
        revision: commit, tag or branch of the Hub; with code, name the commit that you have read.
    """

    def __init__(
        self,
        checkpoint: str,
        image_size: int | None = None,
        dtype: str = "float32",
        trust_remote_code: bool = False,
        revision: str | None = None,
    ):
        model = _any_vision_model(checkpoint, dtype, trust_remote_code, revision)
        native = getattr(model.config, "image_size", 224)
        if not isinstance(native, int):
            raise ValueError(f"{checkpoint} takes {native} images, but a teacher's input must be square")
        patch = getattr(model.config, "patch_size", 1)
        size = resolve_image_size(image_size, native, patch if isinstance(patch, int) else 1)
        parameters = inspect.signature(model.forward).parameters
        self_resizing = "interpolate_pos_encoding" in parameters
        options = {"interpolate_pos_encoding": True} if size != native and self_resizing else {}
        with torch.no_grad():  # shows the grid, and that this size is taken
            try:
                output = model(torch.zeros(1, 3, size, size, dtype=model.dtype), **options)
            except (ValueError, RuntimeError) as error:
                raise ValueError(f"{checkpoint} does not take images of {size} x {size}: {error}") from error
        hidden = getattr(output, "last_hidden_state", None)  # (1, prefix + h*w, C) or (1, C, h, w)
        if hidden is None:
            raise ValueError(f"{checkpoint} returns a {type(output).__name__}, which has no last_hidden_state")
        if hidden.ndim == 4:
            width, side, prefix = hidden.shape[1], hidden.shape[2], 0
        else:
            width, side = hidden.shape[2], size // patch if isinstance(patch, int) else 0
            if not 0 < side * side <= hidden.shape[1]:  # the patches were merged, or are not named
                side = math.isqrt(hidden.shape[1])
            prefix = hidden.shape[1] - side * side
        pooled = getattr(output, "pooler_output", None)
        learned = any(name.startswith("pooler.") for name, _ in model.named_parameters())  # perhaps not in the file
        pooled = None if prefix or learned or pooled is None else pooled.flatten(1)
        super().__init__(
            model,
            image_size=size,
            patch_size=size // side,
            summary_dim=width if pooled is None else pooled.shape[1],
            feature_dim=width,
            **normalization(checkpoint, revision),
            dtype=dtype,
        )
        self.prefix, self.is_pooled, self.options = prefix, pooled is not None, options

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


def _any_vision_model(checkpoint: str, dtype: str, trust_remote_code: bool, revision: str | None) -> Any:
    from transformers import MODEL_MAPPING, AutoConfig

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
    model = load_pretrained(checkpoint, "AutoModel", dtype, heads, config, optional=("pooler.",), **code)
    if model.main_input_name != "pixel_values":
        raise ValueError(f"{checkpoint} is a {type(model).__name__}, which takes {model.main_input_name}, no images")
    return model


BY_MODEL_TYPE: dict[str, Callable[..., Teacher]] = {
    "clip": ClipTeacher,
    "clip_vision_model": ClipTeacher,
    "dinov2": DinoTeacher,
    "dinov2_with_registers": DinoTeacher,
    "dinov3_vit": DinoTeacher,
    "siglip": SiglipTeacher,
    "siglip_vision_model": SiglipTeacher,
    "siglip2": Siglip2Teacher,
    "siglip2_vision_model": Siglip2Teacher,
    "internvl_vision": InternVitTeacher,
    "internvl": InternVitTeacher,
    "intern_vit_6b": InternVitTeacher,
    "internvl_chat": InternVitTeacher,
    "sam": SamTeacher,
    "sam_vision_model": SamTeacher,
    "radio": RadioTeacher,
}


def transformers_teacher(
    checkpoint: str, image_size: int | None = None, dtype: str = "float32", **options: Any
) -> Teacher:
    """The teacher for a transformers checkpoint, chosen by its configuration's `model_type`; `VisionModelTeacher` for
    a type that has none of its own.

    Args:
        checkpoint: Hub id or local folder (config, weights and preprocessor_config.json).
        image_size: None for the configuration's own; otherwise the model interpolates its position embeddings itself.
        dtype: of weights and activations.
        options: `features` for SAM, `adaptor` for RADIO; `trust_remote_code` and `revision` for a type without a
            teacher of its own.

    Raises:
        FileNotFoundError: for a path where no folder is.
        ValueError: for a model_type without a teacher, unknown options, missing or unexpected weights, pickled code,
            or a checkpoint that does not say how its images are normalised.
    """
    is_path = checkpoint.startswith((".", "/", "~")) or checkpoint.count("/") > 1  # and no Hub id
    if is_path and not Path(checkpoint).is_dir():
        raise FileNotFoundError(
            f"there is no folder {checkpoint}; give an existing one, or a Hub id such as owner/name"
        )
    try:
        model_type = config_dict(checkpoint, options.get("revision")).get("model_type")
    except OSError as error:
        if Path(checkpoint).is_dir():
            raise
        reason = one_line(error).removeprefix(f"{checkpoint}: ")
        raise FileNotFoundError(f"there is no folder {checkpoint}, and as a Hub id it failed: {reason}") from error
    if model_type is None and not options.get("trust_remote_code"):
        raise ValueError(f"the configuration of {checkpoint} names no model_type, so it is no transformers model")
    if not isinstance(model_type, (str, type(None))):
        raise ValueError(f"the configuration of {checkpoint} has model_type {model_type!r}, expected a name")
    teacher = BY_MODEL_TYPE.get(model_type or "", VisionModelTeacher)
    check_options(f"the {model_type} teacher", teacher, options)
    return teacher(checkpoint, image_size, dtype, **options)
