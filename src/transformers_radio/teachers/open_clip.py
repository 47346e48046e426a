"""OpenCLIP models: their image towers as teachers, and their text towers."""

import pickle
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from transformers_radio.modeling.errors_radio import OF_DAMAGED_FILES, one_line

from .base import Normalization, Teacher, TeacherOutput, flatten_grid, require, resolve_image_size
from .checkpoints import read_file, unsafe_file_message, unwrap
from .text import TextEncoder
from .timm import patch_features


class OpenClipTeacher(Teacher):
    """The image tower of an OpenCLIP model.

    summary: the pooled, final-normed and projected image embedding, the space shared with text (not L2-normalized).
    features: for OpenCLIP's own ViT the patch tokens of the last block, before `ln_post` and `proj` (so ViT-H has a
    summary of 1024 and features of 1280); for its ResNets the last stage before attention pooling; for a timm tower
    (SigLIP, ConvNeXt, ...) timm's `forward_features` without prefix tokens.

    Args:
        visual: the image tower, for images of `image_size` already.
        config: the model's configuration, as `open_clip.get_model_config` gives it.
        normalization: (mean, std).
        image_size: side of the input in pixels; None for the configuration's own.

    Raises:
        ValueError: for a tower of another kind, or an image_size that is not a multiple of its patch size.
    """

    has_text = True

    def __init__(
        self, visual: Any, config: dict[str, Any], normalization: Normalization, image_size: int | None = None
    ):
        open_clip = require("open_clip")
        if isinstance(visual, open_clip.transformer.VisionTransformer):
            patch_size, feature_dim = visual.patch_size[0], visual.transformer.width
        elif isinstance(visual, open_clip.modified_resnet.ModifiedResNet):
            patch_size, feature_dim = 32, visual.layer4[-1].conv3.out_channels
        elif isinstance(visual, open_clip.timm_model.TimmModel):
            patch_size, feature_dim = visual.trunk.feature_info[-1]["reduction"], visual.trunk.num_features
        else:
            raise ValueError(f"the image tower is a {type(visual).__name__}, which is not supported")
        super().__init__(
            visual,
            image_size=resolve_image_size(image_size, config["vision_cfg"]["image_size"], patch_size),
            patch_size=patch_size,
            summary_dim=config["embed_dim"],
            feature_dim=feature_dim,
            normalization=normalization,
        )

    @classmethod
    def from_checkpoint(cls, checkpoint: str, image_size: int | None = None, dtype: str = "float32") -> Teacher:
        """As `Teacher.from_checkpoint`.

        Args:
            checkpoint: a folder with `open_clip_config.json` and weights (also as "local-dir:PATH"),
                "hf-hub:OWNER/NAME", or "NAME:WEIGHTS" where WEIGHTS is an OpenCLIP tag or a weights file
                ("ViT-H-14-378-quickgelu:dfn5b").
            image_size: for another size than the checkpoint's own, position embeddings are resized as OpenCLIP does it
                (bicubic with antialiasing in its ViT, timm's rule in a timm tower).

        Raises:
            ValueError: for a checkpoint without weights, with other keys than its architecture's, or with pickled
                code; for an image_size that the tower cannot take.
        """
        model, config = load_open_clip(checkpoint, image_size)
        preprocess = require("open_clip").get_model_preprocess_cfg(model)
        return cls(model.visual, config, (preprocess["mean"], preprocess["std"]), image_size).cast(dtype)

    @classmethod
    def without_weights(cls, checkpoint: str, image_size: int | None = None) -> Teacher:
        """The architecture of a "NAME:TAG" that OpenCLIP lists, with random weights on the current device.

        Raises:
            ValueError: for any other checkpoint, and for a ResNet.
        """
        open_clip = require("open_clip")
        name, _, tag = checkpoint.partition(":")
        config, weights = open_clip.get_model_config(name), open_clip.get_pretrained_cfg(name, tag)
        if not config or not weights:
            raise ValueError(
                f"{checkpoint} is not on the disk, and OpenCLIP knows no model and tag NAME:TAG of this name (see "
                "open_clip.list_pretrained()). Download it and give its folder as checkpoint"
            )
        native = config["vision_cfg"].setdefault("image_size", 224)
        if isinstance(config["vision_cfg"].get("layers"), list) or not isinstance(native, int):
            raise ValueError(f"{checkpoint} is no vision transformer for square images; give its folder as checkpoint")
        built = {**config, "vision_cfg": {**config["vision_cfg"], "image_size": image_size or native}}
        if weights.get("quick_gelu"):
            built["quick_gelu"] = True
        model = open_clip.CustomTextCLIP if built.pop("custom_text", False) else open_clip.CLIP
        return cls(model(**built).visual, config, (weights["mean"], weights["std"]), image_size)

    @classmethod
    def text_encoder(cls, checkpoint: str) -> TextEncoder:
        """As `Teacher.text_encoder`; the image tower is loaded too, and leaves the memory again."""
        model, _ = load_open_clip(checkpoint)
        del model.visual
        return OpenClipTextEncoder(model, load_tokenizer(checkpoint))

    def encode(self, pixel_values: torch.Tensor) -> TeacherOutput:
        if hasattr(self.model, "trunk"):  # a timm tower
            features = self.model.trunk.forward_features(pixel_values)
            summary = self.model.head(self.model.trunk.forward_head(features))
            return TeacherOutput(summary, *patch_features(self.model.trunk, features))
        output = self.model.forward_intermediates(pixel_values, indices=1, output_fmt="NCHW")
        return TeacherOutput(output["image_features"], *flatten_grid(output["image_intermediates"][-1]))


class OpenClipTextEncoder(TextEncoder):
    """The text tower of an OpenCLIP model with its own tokenizer."""

    def encode(self, texts: list[str]) -> torch.Tensor:
        tokens = self.tokenizer(texts)  # (n, context length)
        return self.model.encode_text(tokens.to(self.model.logit_scale.device))


def split_checkpoint(checkpoint: str) -> tuple[str, str | None]:
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


def load_tokenizer(checkpoint: str) -> Any:
    """The tokenizer that OpenCLIP has for a checkpoint. Code beside its files never runs, whatever its config asks."""
    open_clip, (name, _) = require("open_clip"), split_checkpoint(checkpoint)
    is_of_transformers = open_clip.get_model_config(name)["text_cfg"].get("hf_tokenizer_name")
    return open_clip.get_tokenizer(name, **({"trust_remote_code": False} if is_of_transformers else {}))


def load_open_clip(checkpoint: str, image_size: int | None = None) -> tuple[Any, dict[str, Any]]:
    """The whole model on the CPU in float32, strictly loaded, and its model config."""
    open_clip = require("open_clip")
    name, weights = split_checkpoint(checkpoint)
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
