"""A student as the image encoder of Segment Anything: segment_anything's own classes, transformers' SAM and SAM3."""

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Sam3Model, Sam3TrackerModel, SamModel
from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.sam.modeling_sam import SamVisionEncoderOutput

from transformers_radio.evaluation.sam_coco.prompting import AdaptorMaps, StudentEncoder, feature_width
from transformers_radio.modeling.errors_radio import shown
from transformers_radio.teachers.segment_anything import PIXEL_MEAN, PIXEL_STD

from .students import open_student

_REFUSED = {
    "Sam2": "reads four maps of its own backbone, at strides 4 to 32, and an adaptor gives one",
    "EdgeTam": "reads four maps of its own backbone, at strides 4 to 32, and an adaptor gives one",
    "SamHQ": "reads maps from inside its own encoder, which no adaptor gives",
}


def swap_sam_encoder(
    sam: Any,
    student: Any,
    adaptor: str | None = None,
    image_size: int | None = None,
    window_size: int | None = None,
) -> Any:
    """Put a student into a SAM in place of its image encoder; prompt encoder and mask decoder stay (paper Table 1).

        sam = swap_sam_encoder(build_sam(checkpoint="sam_vit_h.pth"), "runs/mine/student")
        predictor = SamPredictor(sam)  # and SamAutomaticMaskGenerator(sam), unchanged

    Images come normalized and padded as for SAM. The student's adaptor predicts SAM's features, and SAM's own neck
    reads them where they are those before it. Gradients flow where the caller lets them.

    A swapped model is not saved as one, as these classes build SAM's own encoder when they load: keep SAM's checkpoint
    and the student's folder, and swap again.

    Args:
        sam: a `segment_anything` `Sam`, or a `SamModel`, `Sam3Model` or `Sam3TrackerModel` of transformers, the one
            that the adaptor was distilled from; changed in place.
        student: a student of any type, or its folder or Hub id.
        adaptor: name of its adaptor; "sam", or "sam3" for SAM3, when missing.
        image_size: side of the student's input in pixels. SAM: its own (1024) when missing; with another one SAM works
            in that frame, and the processor of a `SamModel` needs `size={"longest_edge": image_size}` and
            `pad_size={"height": image_size, "width": image_size}`. SAM3: images keep the size of SAM3 and are resized
            for the student; when missing, so that its grid is that of SAM3 (1152 for patches of 16).
        window_size: side of attention windows; None for the student's own. Of a RADIO in patches, 0 for global
            attention; of an E-RADIO in places of its map at stride 32, 0 for windows that follow from the image.

    Returns:
        `sam`.

    Raises:
        OSError: there is no such student.
        ValueError: another kind of SAM, no such adaptor, features of another width than this SAM's, or an image size
            that the student (with these windows) does not take.
    """
    swap = _swap_for(sam)
    student = open_student(student)
    swap(sam, student, adaptor, image_size, window_size)
    if hasattr(sam, "save_pretrained"):
        sam.save_pretrained = _refuse_to_save
    return sam


def _swap_for(sam: Any) -> Any:
    name = type(sam).__name__
    for prefix, reason in _REFUSED.items():
        if name.startswith(prefix):
            raise ValueError(f"A {name} {reason}; use a SAM or SAM3.")
    if isinstance(getattr(sam, "image_encoder", getattr(sam, "vision_encoder", None)), OriginalSamEncoder):
        raise ValueError("This SAM has a student as encoder: load it again, and swap the other student into that one.")
    if isinstance(sam, SamModel):
        return _swap_transformers
    if isinstance(sam, (Sam3Model, Sam3TrackerModel)):
        return _swap_sam3
    if hasattr(sam, "image_encoder") and hasattr(sam, "prompt_encoder") and hasattr(sam, "pixel_mean"):
        return _swap_original
    raise ValueError(
        f"sam is {shown(sam)}, expected a segment_anything Sam, or a SamModel, Sam3Model or Sam3TrackerModel of "
        "transformers."
    )


def _refuse_to_save(*args: Any, **kwargs: Any) -> None:
    raise ValueError(
        "This SAM has a student as encoder, which from_pretrained would not find: keep SAM's own folder and the "
        "student's, and call swap_sam_encoder after loading."
    )


class OriginalSamEncoder(nn.Module):
    """A student as `segment_anything.Sam.image_encoder`; see [`swap_sam_encoder`]."""

    def __init__(self, encoder: StudentEncoder, pixel_mean: torch.Tensor, pixel_std: torch.Tensor):
        super().__init__()
        self.encoder = encoder
        self.img_size = encoder.image_size  # the longest side that SamPredictor resizes images to
        self.mean: torch.Tensor
        self.std: torch.Tensor
        self.register_buffer("mean", pixel_mean / 255, persistent=False)  # (3, 1, 1), for images in [0, 1]
        self.register_buffer("std", pixel_std / 255, persistent=False)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, img_size, img_size) as SAM normalizes and pads them -> embeddings (B, C, g, g)."""
        if pixel_values.shape[2:] != (self.img_size, self.img_size):
            height, width = pixel_values.shape[2:]
            raise ValueError(
                f"images are {height}x{width}, but this SAM takes {self.img_size}x{self.img_size}: resize the longest "
                "side and pad, as its predictor or processor does, or swap with another image_size."
            )
        # clamped: rounding in the way back must not look like another range; SAM's zero padding is its mean color
        pixel_values = (pixel_values.float() * self.std.float() + self.mean.float()).clamp(0, 1)
        return self.encoder.embed(pixel_values)


class TransformersSamEncoder(OriginalSamEncoder):
    """A student as `transformers.SamModel.vision_encoder`; see [`swap_sam_encoder`]."""

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> SamVisionEncoderOutput:  # type: ignore[override]
        embedding = super().forward(pixel_values).to(pixel_values.dtype)
        return SamVisionEncoderOutput(last_hidden_state=embedding)


class Sam3Backbone(AdaptorMaps):
    """A student as the backbone of SAM3's vision encoder; see [`swap_sam_encoder`]."""

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutput:
        """Images (B, 3, S, S) as SAM3 normalizes them -> `last_hidden_state` (B, h*w, C), row-major."""
        mean, std = (
            pixel_values.new_tensor(values, dtype=torch.float32).view(-1, 1, 1)  # (3,) -> (3, 1, 1)
            for values in (IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD)
        )
        images = (pixel_values.float() * std + mean).clamp(0, 1)
        if images.shape[2:] != (self.image_size, self.image_size):
            size = (self.image_size, self.image_size)
            images = F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)
        tokens = self.maps(images).flatten(2).transpose(1, 2)  # (B, C, h, w) -> (B, C, h*w) -> (B, h*w, C)
        return BaseModelOutput(last_hidden_state=tokens.to(pixel_values.dtype).contiguous())


def _swap_original(sam: Any, student: Any, adaptor: str | None, image_size: int | None, window_size: int | None):
    encoder = StudentEncoder(student, sam, adaptor or "sam", image_size, window_size)
    image_encoder = OriginalSamEncoder(encoder, sam.pixel_mean, sam.pixel_std)
    sam.image_encoder = image_encoder.to(sam.device).train(sam.training)
    sam.prompt_encoder.input_image_size = (encoder.image_size, encoder.image_size)


def _swap_transformers(sam: Any, student: Any, adaptor: str | None, image_size: int | None, window_size: int | None):
    neck, prompts = sam.vision_encoder.neck, sam.config.prompt_encoder_config
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))  # (3,) -> (3, 1, 1)
    as_original = SimpleNamespace(  # the same parts by segment_anything's names
        image_encoder=SimpleNamespace(
            img_size=sam.config.vision_config.image_size,
            neck=nn.Sequential(neck.conv1, neck.layer_norm1, neck.conv2, neck.layer_norm2),
        ),
        prompt_encoder=SimpleNamespace(image_embedding_size=(prompts.image_embedding_size,) * 2),
        pixel_mean=mean,
    )
    encoder = StudentEncoder(student, as_original, adaptor or "sam", image_size, window_size)
    sam.vision_encoder = TransformersSamEncoder(encoder, mean, std).to(sam.device).train(sam.training)
    sam.prompt_encoder.input_image_size = encoder.image_size


def _swap_sam3(sam: Any, student: Any, adaptor: str | None, image_size: int | None, window_size: int | None):
    adaptor = adaptor or "sam3"
    config = sam.vision_encoder.config.backbone_config
    width = feature_width(student, adaptor)
    if width != config.hidden_size:
        raise ValueError(
            f"The adaptor {adaptor!r} has features of width {width}, but this SAM3's backbone has "
            f"{config.hidden_size}: use the SAM3 checkpoint that the adaptor was distilled from."
        )
    side = config.image_size // config.patch_size
    image_size = side * student.patch_size if image_size is None else image_size
    backbone = Sam3Backbone(student, adaptor, (side, side), image_size, window_size)
    sam.vision_encoder.backbone = backbone.to(sam.device).train(sam.training)
