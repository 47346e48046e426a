"""The parts of a student's page, without the page: an image in, features as colors, scores of labels, a mask out."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

from transformers_radio.evaluation.classification.zero_shot import zero_shot_classifier
from transformers_radio.evaluation.images.resize import cover_image
from transformers_radio.evaluation.models.encoder import VisionEncoder
from transformers_radio.evaluation.pca import PcaBasis, fit_pca, pca_rgb
from transformers_radio.evaluation.sam_coco.prompting import predict_masks, predict_masks_at_points
from transformers_radio.modeling.decoding_radio import SkippedImage, load_rgb, open_image, read_file

from .models import DemoModels

MAX_BYTES = 20 * 2**20  # of an uploaded file
MAX_PIXELS = 64_000_000  # of an uploaded image, known from its header, before anything is decoded
WORKING_SIDE = 1024  # pixels: larger images are scaled down to it, SAM's own size
MAX_SIDE = 1024  # pixels: the slider's end
MAX_LABELS, MAX_LETTERS = 50, 100  # labels, and letters of each
TEMPLATE = "a photo of a {}"
LOGIT_SCALE = 100.0  # the largest that CLIP allows itself, and what its training ends with

Result = TypeVar("Result")


@dataclass
class Panel:
    """Features of one image as colors.

    Attributes:
        colors: float32 (h, w, 3) in [0, 1], a pixel per patch.
        milliseconds: what the model needed; None where the features come from the same forward pass as the first's.
    """

    title: str
    note: str
    colors: torch.Tensor
    milliseconds: float | None = None


@dataclass
class LabelScore:
    """cosine: of image and text, in [-1, 1]. share: softmax over the labels, in [0, 1]."""

    label: str
    cosine: float
    share: float


def read_upload(path: str | Path) -> Image.Image:
    """The upright RGB image of a file, at most `WORKING_SIDE` pixels wide and high.

    Raises:
        ValueError: it is no image, or a larger one than `MAX_BYTES` and `MAX_PIXELS` allow; nothing is decoded then.
    """
    if Path(path).stat().st_size > MAX_BYTES:
        raise ValueError(f"The file is larger than {MAX_BYTES // 2**20} MB: choose a smaller one.")
    try:
        image = load_rgb(open_image(read_file(path), MAX_PIXELS))
    except SkippedImage as error:
        raise ValueError(f"This is no image that can be shown ({error.reason}: {error}).") from None
    image.thumbnail((WORKING_SIDE, WORKING_SIDE), Image.Resampling.BICUBIC)
    return image


def sides(models: DemoModels) -> tuple[int, int, int]:
    """Smallest, largest and step of the student's input side in pixels, for a slider."""
    student = models.student
    step = student.step
    largest = min(student.model.max_resolution, MAX_SIDE) // step * step
    return step, max(largest, student.image_size), step


def _check_side(models: DemoModels, side: int) -> None:
    smallest, largest, step = sides(models)
    if not smallest <= side <= largest or side % step:
        raise ValueError(f"The side is {side} pixels; expected a multiple of {step} from {smallest} to {largest}.")


def feature_panels(models: DemoModels, image: Image.Image, side: int) -> list[Panel]:
    """The student's features, then for each adaptor the teacher's own (where it is at hand) and the student's.

    A teacher and the student's adaptor to it share a basis, so that their colors compare. All models see the same
    square, the image's center.

    Args:
        side: of the student's input in pixels.

    Raises:
        ValueError: a side that is not one of `sides`.
    """
    student = models.student
    _check_side(models, side)
    output, took = _timed(lambda: student.model(_square(student, image, side)), student.device)
    panels = [_panel("Student", "its own features", output.features, output.grid, milliseconds=took)]
    for name, head in output.adaptors.items():
        basis, teacher = None, models.teachers.get(name)
        if teacher is not None:
            square = _square(teacher, image, teacher.image_size)
            (features, grid), took = _timed(partial(teacher.features, square), student.device)
            basis = fit_pca([features[0]])
            title = f"{name}, the teacher"
            panels.append(_panel(title, f"{teacher.image_size} px", features, grid, basis, took))
        note = "in its own colors" if teacher is None else "in the teacher's colors"
        panels.append(_panel(f"Student as {name}", note, head.features, head.grid, basis))
    return panels


def _panel(
    title: str,
    note: str,
    features: torch.Tensor,
    grid: tuple[int, int],
    basis: PcaBasis | None = None,
    milliseconds: float | None = None,
) -> Panel:
    """features: (1, h*w, C)."""
    (colors,) = pca_rgb([features[0].float()], [grid], basis)
    return Panel(title, f"{note}, {grid[1]}\u00a0×\u00a0{grid[0]} patches", colors, milliseconds)


def parse_labels(text: str) -> list[str]:
    """Labels out of what a visitor types: parted by commas or lines, each once.

    Raises:
        ValueError: none, too many, or one that is too long.
    """
    if len(text) > MAX_LABELS * (MAX_LETTERS + 2):
        raise ValueError(f"The labels have {len(text):,} letters together: type fewer.")
    labels = list(dict.fromkeys(filter(None, (one.strip() for one in text.replace("\n", ",").split(",")))))
    if not labels:
        raise ValueError("There is no label: type some, such as cat, dog, bicycle.")
    if len(labels) > MAX_LABELS:
        raise ValueError(f"There are {len(labels)} labels; at most {MAX_LABELS} are compared at once.")
    if longest := next((label for label in labels if len(label) > MAX_LETTERS), None):
        raise ValueError(f"The label {longest[:20]!r}... has {len(longest)} letters; at most {MAX_LETTERS} are read.")
    return labels


def score_labels(
    models: DemoModels, image: Image.Image, side: int, labels: Sequence[str]
) -> tuple[list[LabelScore], float]:
    """How well labels suit an image, the best first, and the milliseconds that image and texts needed.

    The texts are "a photo of a LABEL". Shares are softmax(100 cosine): they compare these labels with each other and
    say nothing about what none of them names.
    """
    student, text = models.student, models.text
    assert text is not None, models.left_out
    _check_side(models, side)
    square = _square(student, image, side)

    def cosines() -> torch.Tensor:
        classifier = zero_shot_classifier(text, list(labels), [TEMPLATE])  # (labels, D)
        return classifier @ F.normalize(student.language(square)[0], dim=0)  # (labels, D) @ (D,)

    found, took = _timed(cosines, student.device)
    shares = (LOGIT_SCALE * found).softmax(dim=0)
    scores = [LabelScore(*one) for one in zip(labels, found.tolist(), shares.tolist(), strict=True)]
    return sorted(scores, key=lambda score: -score.cosine), took


def embed_for_masks(models: DemoModels, image: Image.Image) -> tuple[torch.Tensor, float]:
    """What SAM's decoder reads, from the student at SAM's own size: (1, C, g, g), and milliseconds."""
    encoder = models.sam_encoder
    assert encoder is not None, models.left_out
    batch = pil_to_tensor(image)[None].to(models.student.device)  # (1, 3, H, W)
    return _timed(lambda: encoder(batch), models.student.device)


def draw_mask(
    models: DemoModels, embedding: torch.Tensor, size: tuple[int, int], clicks: Sequence[tuple[float, float]]
) -> tuple[torch.Tensor, float, float]:
    """The mask of the thing at a point, or within a box.

    Args:
        embedding: from `embed_for_masks`.
        size: (H, W) of the image.
        clicks: one point, or two opposite corners of a box; x, y in pixels.

    Returns:
        The mask, bool (H, W) on the CPU; its IoU with the truth as SAM's decoder predicts it; milliseconds.

    Raises:
        ValueError: a point outside of the image, or a box without an area.
    """
    height, width = size
    if not all(0 <= x < width and 0 <= y < height for x, y in clicks) or len(clicks) not in (1, 2):
        raise ValueError(
            f"The clicks are {list(clicks)}; expected one or two in an image of {width} x {height} pixels."
        )
    if len(clicks) == 1:
        decode = partial(predict_masks_at_points, models.sam, embedding, np.array(clicks), size)
    else:
        (left, right), (top, bottom) = (sorted(values) for values in zip(*clicks, strict=True))
        if left == right or top == bottom:
            raise ValueError("Both corners are in one line: click two opposite corners of a box.")
        decode = partial(predict_masks, models.sam, embedding, np.array([[left, top, right, bottom]]), size)
    (masks, quality), took = _timed(decode, models.student.device)
    return masks[0].cpu(), quality[0].item(), took


def _square(encoder: VisionEncoder, image: Image.Image, side: int) -> torch.Tensor:
    """float (1, 3, side, side) in [0, 1] on the encoder's device: the center of the image."""
    return (cover_image(image, (side, side)).float() / 255)[None].to(encoder.device)


@torch.no_grad()
def _timed(function: Callable[[], Result], device: torch.device) -> tuple[Result, float]:
    """What a function returns, and how many milliseconds it needed."""
    started = time.perf_counter()
    result = function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, 1000 * (time.perf_counter() - started)
