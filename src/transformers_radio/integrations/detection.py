"""A student as the backbone of transformers' detectors and segmenters, and of torchvision's Mask R-CNN."""

import copy
import math
from collections import OrderedDict
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.rpn import AnchorGenerator
from transformers import PreTrainedConfig, PreTrainedModel

from transformers_radio import ERadioConfig, RadioPyramidConfig, load_student  # this registers their backbones too
from transformers_radio.modeling.errors_radio import shown
from transformers_radio.modeling.parts_radio import rest_if_frozen
from transformers_radio.modeling.pyramid_radio import RadioSimplePyramid

from .students import open_student

# what a stage of E-RADIO is called by its stride
_ERADIO_STAGES = {4: "stage1", 8: "stage2", 16: "stage3", 32: "stage4"}
_MASK_RCNN_STRIDES = [4, 8, 16, 32]  # torchvision's heads read these; a fifth map at 64 is for proposals alone


def build_with_backbone(
    model_class: Any,
    config: PreTrainedConfig,
    student: Any,
    strides: list[int] | None = None,
    window_size: int | None = None,
) -> Any:
    """A detector or segmenter of transformers with a student as its backbone, weights included.

        model = build_with_backbone(RTDetrForObjectDetection, RTDetrConfig(num_labels=80), "runs/mine/student")

    transformers builds a model with a `backbone_config` from random weights; here the student's are copied into it. A
    RADIO student gets ViTDet's simple pyramid, whose weights are new like those of the heads; an E-RADIO has maps at
    these strides by itself. Save and load as any model of transformers, once a name of this package was imported. An
    RT-DETR or D-FINE refuses images with fewer places than it has queries; reopened, it fails on them in torch instead
    ("selected index k out of range").

    Args:
        model_class: such as `RTDetrForObjectDetection`, `DFineForObjectDetection`, `UperNetForSemanticSegmentation`
            or `Mask2FormerForUniversalSegmentation`.
        config: its configuration; a copy gets the backbone, and the number of channels where it states one.
        student: a RADIO or E-RADIO, or its folder or Hub id. Its adaptors are left out.
        strides: of the maps in pixels. Missing: those that `config` states (`feat_strides`, `feature_strides`), else
            4, 8, 16 and 32.
        window_size: side of attention windows, in place of the student's `config.window_size`: of a RADIO in patches
            (ViTDet has 16 at 1024 pixels), with 0 for global attention, and image sides are then multiples of patch
            size times window; of an E-RADIO in places of its map at stride 32, with 0 for windows that follow
            the image.

    Raises:
        OSError: there is no such student.
        ValueError: a student without a backbone, strides that it cannot give, windows that it does not have, a class
            that is no model, or a configuration without a `backbone_config`.
    """
    if not isinstance(model_class, type) or not issubclass(model_class, PreTrainedModel):
        raise ValueError(f"model_class is {shown(model_class)}, expected a class such as RTDetrForObjectDetection.")
    if not hasattr(config, "backbone_config"):
        raise ValueError(f"config is {shown(config)}, which has no backbone_config; pass the class's configuration.")
    student = open_student(student)
    config = copy.deepcopy(config)
    if strides is None:
        strides = getattr(config, "feat_strides", None) or getattr(config, "feature_strides", None) or [4, 8, 16, 32]
    strides = list(strides)
    backbone, channels = _backbone_config(student, strides, window_size)
    config.backbone_config = backbone
    if hasattr(config, "encoder_in_channels"):
        config.encoder_in_channels = channels
    if hasattr(config, "feat_strides"):
        config.feat_strides = strides
    if window_size is not None:
        student = copy.copy(student)  # shares its weights
        student.config = backbone  # has the windows, which `load_student` compares
    model = load_student(model_class(config), student)
    if hasattr(config, "encoder_in_channels") and hasattr(config, "num_queries"):  # RT-DETR and its successors
        step = math.lcm(student.min_resolution_step, *strides)
        model.register_forward_pre_hook(partial(_check_places, strides, step), with_kwargs=True)
    return model


def _check_places(strides: list[int], step: int, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raises ValueError for images whose maps have fewer places than the model has queries, which it chooses there."""
    images = kwargs.get("pixel_values", args[0] if args else None)
    if not isinstance(images, torch.Tensor) or images.ndim != 4:
        return

    def places(height: int, width: int) -> int:
        return sum((height // stride) * (width // stride) for stride in strides)

    (height, width), queries = images.shape[-2:], model.config.num_queries
    if places(height, width) < queries:
        side = next(side for side in count(step, step) if places(side, side) >= queries)
        raise ValueError(
            f"pixel_values are {height}x{width} pixels, whose maps have {places(height, width)} places, but "
            f"num_queries is {queries}: pass images of {side}x{side} pixels or more, or build the model with "
            f"num_queries={places(height, width)} or fewer."
        )


def _backbone_config(student: Any, strides: list[int], window_size: int | None) -> tuple[Any, list[int]]:
    """The backbone's configuration, and the channels of its maps."""
    kind = student.config.model_type
    if kind == "radio":
        fields = student.config.to_dict()
        for name in ("model_type", "auto_map", "architectures"):
            fields.pop(name, None)
        if window_size is not None:  # also in training, in place of random ones
            fields |= {"window_size": window_size, "train_window_sizes": None}
        backbone = RadioPyramidConfig(**{**fields, "adaptors": {}, "strides": strides})
        return backbone, [backbone.pyramid_size] * len(strides)
    if kind == "eradio":
        missing = [stride for stride in strides if stride not in _ERADIO_STAGES]
        if missing:
            raise ValueError(
                f"strides are {strides}, but E-RADIO has no map at {missing[0]}, only at 4, 8, 16 and 32."
            )
        backbone = copy.deepcopy(student.config)
        backbone.adaptors = {}
        if window_size is not None:
            backbone.window_size = window_size or None
        backbone.set_output_features_output_indices([_ERADIO_STAGES[stride] for stride in strides], None)
        return backbone, [_eradio_channels(backbone)[stride] for stride in strides]
    raise ValueError(
        f"The student is of type {kind}, which has no backbone class for transformers; use a RADIO or E-RADIO, or "
        "mask_rcnn, which takes every student."
    )


def _eradio_channels(config: ERadioConfig) -> dict[int, int]:
    """Channels of the maps by stride."""
    return dict(zip((4, 8, 16, 32), config.channels, strict=True))


def mask_rcnn(
    student: Any,
    num_classes: int,
    image_size: int = 1024,
    window_size: int | None = None,
    out_channels: int = 256,
    **options: Any,
) -> MaskRCNN:
    """torchvision's Mask R-CNN on a student, as in ViTDet: a simple pyramid at strides 4 to 32, and 64 for proposals.

    Images are in [0, 1], as torchvision takes them; the student normalizes. Everything is trainable, the student
    included, which is a float32 copy without adaptors; pyramid and heads are new.

    Args:
        student: a student of any type whose stride is a power of two, or its folder or Hub id.
        num_classes: classes of objects plus one, for the background.
        image_size: longest side in pixels that images are resized to; they are then padded to a multiple of the
            student's step.
        window_size: side of attention windows, in place of the student's `config.window_size`: of a RADIO in patches,
            with 0 for global attention; of an E-RADIO in places of its map at stride 32, with 0 for windows that
            follow from the image. None for the student's own.
        out_channels: of the pyramid's maps. Fewer than ViTDet's 256 make pyramid and heads several times faster.
        options: of `torchvision.models.detection.MaskRCNN`, such as `box_detections_per_img`.

    Raises:
        OSError: there is no such student.
        ValueError: a stride that is not a power of two, windows or an image size that the student does not have, or a
            number below its smallest.
    """
    for name, value, least in (("num_classes", num_classes, 2), ("image_size", image_size, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} is {shown(value)}, expected a whole number from {least} on.")
    backbone = StudentPyramid(open_student(student), out_channels, window_size)
    side = -(-image_size // backbone.step) * backbone.step
    if backbone.student.get_nearest_supported_resolution(side, side) != (side, side):
        raise ValueError(
            f"image_size is {image_size}, which is padded to {side}, but the student is built for images of "
            f"{backbone.student.min_resolution_step} pixels alone: use another student."
        )
    # from 32 pixels on at stride 4, as torchvision's own, in proportion to the image
    sizes = tuple((max(8, round(image_size / 1024 * side)),) for side in (32, 64, 128, 256, 512))
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    return MaskRCNN(
        backbone,
        num_classes,
        **{
            "min_size": image_size,
            "max_size": image_size,
            "image_mean": [0.0, 0.0, 0.0],
            "image_std": [1.0, 1.0, 1.0],
            "size_divisible": backbone.step,
            "rpn_anchor_generator": anchors,
            **options,
        },
    )


class StudentPyramid(nn.Module):
    """A student and ViTDet's simple pyramid as a backbone of torchvision's detectors; see [`mask_rcnn`].

    Attributes:
        out_channels: of each map.
        step: image sides must be multiples of it, in pixels.
    """

    def __init__(self, student: Any, out_channels: int = 256, window_size: int | None = None):
        super().__init__()
        if window_size is not None and not hasattr(student.config, "window_size"):
            raise ValueError(f"window_size is {window_size}, but the student has no attention windows: leave it out.")
        training = student.training
        self.student = copy.deepcopy(student.with_adaptors([])).float().train(training)
        if window_size is not None:
            self.student.config.window_size = window_size or None
            if hasattr(self.student.config, "train_window_sizes"):
                self.student.config.train_window_sizes = None
        self.pyramid = RadioSimplePyramid(student.feature_dim, student.patch_size, _MASK_RCNN_STRIDES, out_channels)
        self.out_channels = out_channels
        self.step = math.lcm(self.student.min_resolution_step, 64)

    def train(self, mode: bool = True) -> "StudentPyramid":
        super().train(mode)
        rest_if_frozen(self.student)
        return self

    def forward(self, images: torch.Tensor) -> "OrderedDict[str, torch.Tensor]":
        """Images (B, 3, H, W) in [0, 1] -> maps (B, out_channels, H / stride, W / stride) at strides 4 to 64."""
        features = self.student(images, adaptors=[]).features
        maps = self.pyramid(self.student.features_to_grid(features, *images.shape[-2:]))
        named = OrderedDict((str(level), one) for level, one in enumerate(maps))
        named["pool"] = maps[-1][:, :, ::2, ::2]  # as in torchvision's own pyramid, for proposals alone
        return named
