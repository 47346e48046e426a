"""A student as an open_clip model: images through its adaptor, text through the teacher's own text tower."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from transformers_radio.evaluation.models.encoder import language_adaptor
from transformers_radio.modeling.errors_radio import naming_checkpoint
from transformers_radio.modeling.parts_radio import rest_if_frozen
from transformers_radio.teachers.base import require
from transformers_radio.teachers.checkpoints import resolve_checkpoint
from transformers_radio.teachers.open_clip import load_open_clip, load_tokenizer

from .students import open_student

# text towers of transformers that NVIDIA's releases name -> the same weights in open_clip
_TWINS = {
    "transformers:google/siglip2-giant-opt-patch16-384": "open_clip:ViT-gopt-16-SigLIP2-384:webli",
    "transformers:openai/clip-vit-large-patch14-336": "open_clip:ViT-L-14-336-quickgelu:openai",
    "transformers:openai/clip-vit-large-patch14": "open_clip:ViT-L-14-quickgelu:openai",
}


def as_open_clip(
    student: Any, text: str | None = None, adaptor: str | None = None, image_size: int | None = None
) -> tuple[Any, Callable[[Any], torch.Tensor], Any]:
    """A student as what code for open_clip works with: a model, the transform of its images, and its tokenizer.

        model, preprocess, tokenizer = as_open_clip("runs/mine/student")
        images = model.encode_image(preprocess(image)[None], normalize=True)  # (1, D), the student's adaptor
        texts = model.encode_text(tokenizer(["a photo of a cat"]), normalize=True)  # (1, D), the teacher's text tower

    The model is an `open_clip.CLIP` or `CustomTextCLIP` with the teacher's text tower, logit scale and bias, and the
    student as `visual`, so `encode_image`, `encode_text`, `model(image, text)` and `get_logits` are open_clip's own.

    Args:
        student: a student of any type with an adaptor to an OpenCLIP teacher, or its folder or Hub id. It is not
            copied.
        text: `open_clip:CHECKPOINT` of the text tower (a folder, hf-hub:OWNER/NAME or NAME:TAG); the one that the
            adaptor was distilled from when missing, or open_clip's copy of it.
        adaptor: name of the adaptor; chosen as zero-shot evaluation does when missing.
        image_size: side of the student's square input in pixels; its preferred resolution when missing.

    Returns:
        `(model, preprocess, tokenizer)`, the model in eval mode. `preprocess` resizes the shortest side and crops the
        center, as open_clip does; its pixels are in [0, 1] and not normalized, which the student does.

    Raises:
        OSError: there is no such student or text tower.
        ValueError: no adaptor to a teacher with a text tower, a text tower that is not OpenCLIP's or has another
            width, or an image size that the student does not take.
    """
    open_clip = require("open_clip")
    student = open_student(student)
    adaptors = student.config.adaptors
    chosen = language_adaptor(adaptors, adaptor, type(student).__name__)
    if chosen is None:
        raise ValueError(
            f"The student has no adaptor to a teacher with a text tower (it has {', '.join(adaptors) or 'none'}): "
            "name one with adaptor=..., or distill a student with a CLIP or SigLIP teacher."
        )
    checkpoint = resolve_checkpoint(_checkpoint(text or adaptors[chosen]["teacher"], chosen))
    with naming_checkpoint(checkpoint):
        model, config = load_open_clip(checkpoint)
    if not isinstance(model, (open_clip.CLIP, open_clip.CustomTextCLIP)):
        raise ValueError(
            f"{checkpoint} is a {type(model).__name__}; expected a CLIP, whose image tower gives vectors."
        )
    if config["embed_dim"] != adaptors[chosen]["summary_dim"]:
        raise ValueError(
            f"The adaptor {chosen!r} gives embeddings of {adaptors[chosen]['summary_dim']} dimensions, but the text "
            f"tower {checkpoint} has {config['embed_dim']}: use that of the teacher, {adaptors[chosen]['teacher']!r}."
        )
    model.visual = StudentVisual(student, chosen, image_size)
    preprocess = open_clip.transform.PreprocessCfg(**model.visual.preprocess_cfg)
    transform = open_clip.transform.image_transform_v2(preprocess, is_train=False)
    return model.to(student.device).eval(), transform, load_tokenizer(checkpoint)


def _checkpoint(teacher: str, adaptor: str) -> str:
    """What follows "open_clip:"."""
    kind, _, checkpoint = _TWINS.get(teacher, teacher).partition(":")
    if kind != "open_clip" or not checkpoint:
        raise ValueError(
            f"The text tower of the adaptor {adaptor!r} is {teacher!r}, which open_clip does not run: name one of its "
            "own with the same embeddings, text='open_clip:CHECKPOINT'."
        )
    return checkpoint


class StudentVisual(nn.Module):
    """A student's adaptor as the `visual` of an open_clip model; see [`as_open_clip`]."""

    def __init__(self, student: Any, adaptor: str, image_size: int | None = None):
        super().__init__()
        side = student.preferred_resolution if image_size is None else image_size
        if student.get_nearest_supported_resolution(side, side) != (side, side):
            nearest = student.get_nearest_supported_resolution(side, side)[0]
            raise ValueError(f"image_size is {side}, which the student does not take: use {nearest}.")
        self.student = student
        self.adaptor = adaptor
        self.image_size = (side, side)
        self.image_mean, self.image_std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)  # the student normalizes
        self.preprocess_cfg = {"size": self.image_size, "mean": self.image_mean, "std": self.image_std}

    def train(self, mode: bool = True) -> "StudentVisual":
        super().train(mode)
        rest_if_frozen(self.student)
        return self

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) in [0, 1] -> embeddings (B, D) in their dtype, not L2-normalized."""
        output = self.student(images.to(self.student.dtype), adaptors=[self.adaptor])
        return output.adaptors[self.adaptor].summary.to(images.dtype)

    def lock(self, unlocked_groups: int = 0, freeze_bn_stats: bool = False) -> None:
        """Freezes the student, as open_clip's `lock_image_tower` asks for; it stays in eval mode in any case.

        Raises:
            ValueError: for `unlocked_groups`, which only open_clip's own towers have.
        """
        if unlocked_groups:
            raise ValueError(f"unlocked_groups is {unlocked_groups}, but a student is frozen as a whole: pass 0.")
        self.requires_grad_(False)
        self.train(self.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        if enable:
            self.student.gradient_checkpointing_enable()
        else:
            self.student.gradient_checkpointing_disable()
