"""OpenCLIP models as teachers, and their text towers for zero-shot classification."""

import pickle
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from transformers_radio.modeling.errors_radio import OF_DAMAGED_FILES, naming_checkpoint, one_line

from .base import (
    Teacher,
    TeacherOutput,
    flatten_grid,
    require,
    resolve_image_size,
)
from .checkpoints import read_file, resolve_checkpoint, unsafe_file_message, unwrap
from .timm import patch_features

TEXT_BATCH = 256


class OpenClipTeacher(Teacher):
    """The image tower of an OpenCLIP model.

    summary: the pooled, final-normed and projected image embedding, the space shared with text (not L2-normalised).
    features: for OpenCLIP's own ViT the patch tokens of the last block, before `ln_post` and `proj` (so ViT-H has a
    summary of 1024 and features of 1280); for its ResNets the last stage before attention pooling; for a timm tower
    (SigLIP, ConvNeXt, ...) timm's `forward_features` without prefix tokens.

    Args:
        checkpoint: a folder with `open_clip_config.json` and weights (also as "local-dir:PATH"), "hf-hub:OWNER/NAME",
            or "NAME:WEIGHTS" where WEIGHTS is an OpenCLIP tag or a weights file ("ViT-H-14-378-quickgelu:dfn5b").
        image_size: None for the checkpoint's own; otherwise the position embeddings are resized as OpenCLIP does it
            (bicubic with antialiasing in its ViT, timm's rule in a timm tower).
        dtype: of weights and activations.

    Raises:
        ValueError: for a checkpoint without weights, with other keys than its architecture's, or with pickled code;
            for an image_size that the tower cannot take.
    """

    def __init__(self, checkpoint: str, image_size: int | None = None, dtype: str = "float32"):
        open_clip = require("open_clip")
        model, model_config = _load_open_clip(checkpoint, image_size)
        visual = model.visual
        if isinstance(visual, open_clip.transformer.VisionTransformer):
            patch_size, feature_dim = visual.patch_size[0], visual.transformer.width
        elif isinstance(visual, open_clip.modified_resnet.ModifiedResNet):
            patch_size, feature_dim = 32, visual.layer4[-1].conv3.out_channels
        elif isinstance(visual, open_clip.timm_model.TimmModel):
            patch_size, feature_dim = visual.trunk.feature_info[-1]["reduction"], visual.trunk.num_features
        else:
            raise ValueError(f"{checkpoint} has a {type(visual).__name__} image tower, which is not supported")
        preprocess = open_clip.get_model_preprocess_cfg(model)
        super().__init__(
            visual,
            image_size=resolve_image_size(image_size, model_config["vision_cfg"]["image_size"], patch_size),
            patch_size=patch_size,
            summary_dim=model_config["embed_dim"],
            feature_dim=feature_dim,
            mean=preprocess["mean"],
            std=preprocess["std"],
            dtype=dtype,
        )

    def encode(self, pixel_values: torch.Tensor) -> TeacherOutput:
        if hasattr(self.model, "trunk"):  # a timm tower
            features = self.model.trunk.forward_features(pixel_values)
            summary = self.model.head(self.model.trunk.forward_head(features))
            return TeacherOutput(summary, *patch_features(self.model.trunk, features))
        output = self.model.forward_intermediates(pixel_values, indices=1, output_fmt="NCHW")
        return TeacherOutput(output["image_features"], *flatten_grid(output["image_intermediates"][-1]))


class OpenClipTextEncoder(nn.Module):
    """The text tower of an OpenCLIP model with its own tokenizer: N texts -> (N, dim) float32, not normalised."""

    def __init__(self, model: nn.Module, tokenizer: Any):
        super().__init__()
        self.model: Any = model.requires_grad_(False).eval()
        self.tokenizer = tokenizer

    @torch.no_grad()
    def forward(self, texts: list[str]) -> torch.Tensor:
        if isinstance(texts, str) or not texts:
            raise ValueError(f"texts must be a list of at least one string, got {texts!r}")
        device = self.model.logit_scale.device
        embeddings = []
        for start in range(0, len(texts), TEXT_BATCH):
            tokens = self.tokenizer(texts[start : start + TEXT_BATCH])  # (n, context length)
            embeddings.append(self.model.encode_text(tokens.to(device)).float())
        return torch.cat(embeddings)


def load_text_encoder(checkpoint: str) -> OpenClipTextEncoder:
    """The text tower of an OpenCLIP checkpoint, given as for `OpenClipTeacher`; the image tower leaves the memory.

    The result is called with a list of texts and returns their embeddings (N, dim), float32 and not L2-normalised.
    """
    open_clip = require("open_clip")
    checkpoint = resolve_checkpoint(checkpoint)
    with naming_checkpoint(checkpoint):
        model, _ = _load_open_clip(checkpoint)
    del model.visual
    return OpenClipTextEncoder(model, open_clip.get_tokenizer(_split_checkpoint(checkpoint)[0]))


def _split_checkpoint(checkpoint: str) -> tuple[str, str | None]:
    """OpenCLIP's (model name, weights) of a checkpoint string; the weights are None where the name brings its own."""
    if checkpoint.startswith(("hf-hub:", "local-dir:")):
        return checkpoint, None
    if Path(checkpoint).is_dir():
        return f"local-dir:{checkpoint}", None
    name, _, weights = checkpoint.partition(":")
    if not weights:
        raise ValueError(
            f"open_clip checkpoint {checkpoint!r} is neither a folder nor names its weights: use a folder with "
            "open_clip_config.json, hf-hub:OWNER/NAME, or NAME:TAG_OR_FILE such as ViT-H-14-378-quickgelu:dfn5b"
        )
    return name, weights


def _load_open_clip(checkpoint: str, image_size: int | None = None) -> tuple[Any, dict[str, Any]]:
    """The whole model on the CPU in float32, strictly loaded, and its model config."""
    open_clip = require("open_clip")
    name, weights = _split_checkpoint(checkpoint)
    model_config = open_clip.get_model_config(name)
    if model_config is None:
        raise ValueError(f"OpenCLIP knows no model {name!r}: see open_clip.list_models()")
    native = model_config["vision_cfg"].get("image_size", 224)
    model_config["vision_cfg"]["image_size"] = native
    if not isinstance(native, int):
        raise ValueError(f"{checkpoint} takes {native} images, but a teacher's input must be square")
    if isinstance(model_config["vision_cfg"].get("layers"), list) and image_size not in (None, native):
        raise ValueError(
            f"image_size={image_size} is impossible for the ResNet {checkpoint}: its pooling is tied to {native}"
        )
    # A tag's weights may need QuickGELU although the plain model name does not say so; OpenCLIP would only warn.
    quick_gelu = bool(weights and open_clip.get_pretrained_cfg(name, weights).get("quick_gelu", False))
    vision = model_config["vision_cfg"]
    is_vit = "timm_model_name" not in vision and not isinstance(vision.get("layers"), list)  # else a ResNet
    try:
        with tempfile.TemporaryDirectory() as folder:
            model = open_clip.create_model(
                name,
                pretrained=_plain_file(weights, folder),
                force_image_size=None if is_vit else image_size,
                force_quick_gelu=quick_gelu,
                require_pretrained=True,
                weights_only=True,
            )
    except pickle.UnpicklingError as error:
        raise ValueError(unsafe_file_message(weights or name)) from error
    except (OSError, ValueError, *OF_DAMAGED_FILES) as error:
        raise ValueError(f"OpenCLIP could not load {checkpoint}: {one_line(error)}") from error
    if is_vit and image_size not in (None, native):
        # After loading, in float32: OpenCLIP would resize what the file holds, and a CPU cannot do that in half.
        visual = model.visual
        visual.image_size = (image_size, image_size)
        visual.grid_size = tuple(image_size // side for side in visual.patch_size)
        state = {"visual.positional_embedding": visual.positional_embedding.detach()}
        open_clip.model.resize_pos_embed(state, model)
        visual.positional_embedding = nn.Parameter(state["visual.positional_embedding"])
    return model, model_config


def _plain_file(weights: str | None, folder: str) -> str | None:
    """The file that OpenCLIP is to read: a copy in `folder` where the state dict is wrapped, as OpenCLIP itself
    unwraps little of what training scripts write; otherwise what was given, a tag or a file."""
    if weights is None or not Path(weights).is_file() or Path(weights).suffix in (".safetensors", ".npz", ".npy"):
        return weights
    saved = read_file(weights)
    plain = unwrap(saved, weights)
    if plain is saved:
        return weights
    path = str(Path(folder) / "weights.pt")
    torch.save(plain, path)
    return path
