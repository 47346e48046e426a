"""The quickstart's columns: zero-shot, k-NN, a linear segmentation probe, masks from SAM's own decoder."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision.transforms.v2.functional import InterpolationMode, resize
from tqdm.auto import tqdm

from transformers_radio.evaluation.classification.knn import knn_accuracy
from transformers_radio.evaluation.classification.zero_shot import zero_shot_accuracy, zero_shot_classifier
from transformers_radio.evaluation.models.encoder import VisionEncoder
from transformers_radio.evaluation.sam_coco.measure import prompted_mask_iou
from transformers_radio.evaluation.sam_coco.prompting import SamEncoder, StudentEncoder
from transformers_radio.evaluation.segmentation.quick_probe import probe_miou
from transformers_radio.teachers import load_sam, load_text_encoder
from transformers_radio.training import Recipe

from .scenes import CLASS_NAMES
from .teacher_data import Split, load_split

TEMPLATES = ["a {}", "a photo of a {}", "a picture of a {}"]
BANK_IMAGES = 2880  # of the training split, 30 per class: enough for k = 20, and half a minute faster than all
PROBE_IMAGES = 1500
SCORED_IMAGES = 500  # of the validation split, for mIoU and masks, which cost more than labels
BATCH_SIZE = 64


@dataclass
class Yardstick:
    """What all rows of the table are measured with; loaded once."""

    world: Path
    recipe: Recipe
    train: Split = field(init=False)
    validation: Split = field(init=False)
    classifier: torch.Tensor = field(init=False)
    sam: Any = field(init=False)

    def __post_init__(self) -> None:
        self.train, self.validation = (
            load_split(self.world, "train", BANK_IMAGES),
            load_split(self.world, "validation"),
        )
        text_encoder = load_text_encoder("open_clip", self.recipe.teachers["clip"].checkpoint)
        self.classifier = zero_shot_classifier(text_encoder, CLASS_NAMES, TEMPLATES)
        self.sam = load_sam(self.recipe.teachers["sam"].checkpoint)

    @property
    def notes(self) -> list[str]:
        images, classes = len(self.validation.classes), len(CLASS_NAMES)
        return [
            f"{images} validation images of {classes} classes; k-NN: k = 20, temperature 0.07, bank of {BANK_IMAGES} "
            f"training images; zero-shot: {len(TEMPLATES)} templates.",
            f"mIoU: linear probe on the features of {PROBE_IMAGES} training images, {classes} classes and background. "
            "Masks: mean IoU under true boxes through SAM's own decoder, from an input of "
            f"{self.sam.image_encoder.img_size} pixels. Both on {SCORED_IMAGES} validation images.",
        ]


@dataclass
class EncodedSplit:
    """What a model makes of a split, from one pass over its images."""

    summary: torch.Tensor  # (N, D)
    language: torch.Tensor | None  # (N, E), in the space of the text encoder
    maps: torch.Tensor  # features of the first M images, bfloat16 (M, C, h, w)


def measure(encoder: VisionEncoder, yardstick: Yardstick) -> dict[str, float | None]:
    """Column -> percent; None where a model does not have the output."""
    train, validation, name = yardstick.train, yardstick.validation, encoder.name
    bank = encode_split(encoder, train.images, PROBE_IMAGES, f"{name}: training images")
    queries = encode_split(encoder, validation.images, SCORED_IMAGES, f"{name}: validation images")
    with one_thread():
        return score(encoder, yardstick, bank, queries)


def score(
    encoder: VisionEncoder, yardstick: Yardstick, bank: EncodedSplit, queries: EncodedSplit
) -> dict[str, float | None]:
    train, validation, name = yardstick.train, yardstick.validation, encoder.name
    metrics: dict[str, float | None] = {"Zero-shot": None, "k-NN": None, "mIoU": None, "Masks": None}
    if queries.language is not None:
        metrics["Zero-shot"] = zero_shot_accuracy(queries.language, yardstick.classifier, validation.classes)
    metrics["k-NN"] = knn_accuracy(bank.summary, train.classes, queries.summary, validation.classes)
    metrics["mIoU"] = probe_miou(
        (bank.maps, train.semantic[:PROBE_IMAGES]),
        (queries.maps, validation.semantic[:SCORED_IMAGES]),
        num_classes=1 + len(CLASS_NAMES),
        description=f"{name}: probe",
    )
    has_sam = "sam" in encoder.model.adaptors if encoder.is_student else encoder.spec.kind == "segment_anything"
    if has_sam:
        sam = yardstick.sam
        embed: nn.Module = StudentEncoder(encoder.model, sam) if encoder.is_student else SamEncoder(sam)
        metrics["Masks"] = prompted_mask_iou(
            embed,
            sam,
            validation.images[:SCORED_IMAGES],
            validation.boxes[:SCORED_IMAGES],
            validation.instances[:SCORED_IMAGES],
        )
    return metrics


@contextmanager
def one_thread() -> Iterator[None]:
    """Within this, torch has one thread: products as small as a probe's or SAM's decoder's take longer in two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def encode_split(encoder: VisionEncoder, images: torch.Tensor, mapped: int, description: str) -> EncodedSplit:
    """Every image at the encoder's size, once; features are kept of the first `mapped` images.

    Args:
        images: uint8 (N, 3, H, W).
    """
    summaries: list[torch.Tensor] = []
    languages: list[torch.Tensor] = []
    maps: list[torch.Tensor] = []
    for batch in tqdm(resize_images(images, encoder.image_size).split(BATCH_SIZE), desc=description, unit="batch"):
        encoded = encoder.encode(batch.float() / 255)
        summaries.append(encoded.summary)
        if encoded.language is not None:
            languages.append(encoded.language)
        if len(maps) * BATCH_SIZE < mapped:
            # (B, h*w, C) -> (B, C, h*w) -> (B, C, h, w)
            maps.append(encoded.features.transpose(1, 2).unflatten(2, encoded.grid).bfloat16())
    language = torch.cat(languages) if languages else None
    return EncodedSplit(torch.cat(summaries), language, torch.cat(maps)[:mapped])


def resize_images(images: torch.Tensor, side: int) -> torch.Tensor:
    """(B, 3, H, W) -> (B, 3, side, side), bicubic."""
    return resize(images, [side, side], InterpolationMode.BICUBIC, antialias=True)
