"""Labelled images at the protocol's resize, and the summary vector of each of them."""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from transformers_radio.data.images import SkippedImage, decode_rgb
from transformers_radio.data.source import read_image

logger = logging.getLogger(__name__)

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")
LABEL_COLUMNS = ("label", "labels", "cls")


@dataclass
class LabelledImages:
    """`images` uint8 (N, 3, H, W); `labels` int64 (N,); `class_names` when the source states them; `skipped` images
    per reason (they are in neither tensor)."""

    images: torch.Tensor
    labels: torch.Tensor
    class_names: list[str] | None
    skipped: dict[str, int]


def resize_image(image: Image.Image, image_size: int | tuple[int, int]) -> torch.Tensor:
    """Resize an RGB image with bicubic interpolation and return uint8 (3, H, W).

    `image_size` is (H, W) to scale the image until it covers H x W and cut out the centre (the aspect ratio stays),
    or one number for exactly that square (the aspect ratio goes).
    """
    if isinstance(image_size, int):
        image = image.resize((image_size, image_size), Image.Resampling.BICUBIC)
    else:
        height, width = image_size
        image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()  # (H, W, 3) -> (3, H, W)


def load_labelled_images(
    source: str | Path,
    split: str,
    image_size: int | tuple[int, int],
    name: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    limit: int | None = None,
) -> LabelledImages:
    """Read one split of a classification set into memory, decoded as training decodes.

    Args:
        source: a folder or a Hub id that `datasets.load_dataset` understands: class folders of images, WebDataset tars
            with `.cls` files, or Parquet. It is streamed, so nothing is copied into a cache.
        split: such as `"train"` or `"validation"`.
        image_size: see `resize_image`. A split takes N * 3 * H * W bytes of memory.
        name: the configuration of a Hub dataset that has several.
        image_column, label_column: found among the usual names unless given.
        limit: read only the first samples. Class folders come class by class, so there it means the first classes.

    Raises:
        ValueError: no image or label column, a label that is not a class index, no readable image at all.
    """
    sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; expected at least 1, or None for the whole split.")
    if len(sides) != 2 or min(sides) < 1:
        raise ValueError(f"image_size is {image_size!r}; give one side or (height, width), in pixels, at least 1.")
    stream = datasets.load_dataset(str(source), name, split=split, streaming=True)
    columns = list(stream.features or next(iter(stream)))
    image_column = _find_column(image_column, IMAGE_COLUMNS, columns, "image", str(source))
    label_column = _find_column(label_column, LABEL_COLUMNS, columns, "label", str(source))
    class_names = getattr((stream.features or {}).get(label_column), "names", None)
    # Undecoded, so that one broken file is one skipped image and not the end of the run.
    stream = stream.select_columns([image_column, label_column])
    stream = stream.cast_column(image_column, datasets.Image(decode=False))
    if limit is not None:
        stream = stream.take(limit)

    images, labels, skipped = [], [], Counter[str]()
    for sample in tqdm(stream, desc=f"{source} {split}", unit=" images", total=limit):
        label = sample[label_column]
        if isinstance(label, bool) or not isinstance(label, int) or label < 0:
            raise ValueError(
                f"{label!r} in column {label_column!r} of {source} ({split}) is no class index; expected an integer "
                "from 0. Choose another label_column, or a split with labels."
            )
        try:
            images.append(resize_image(decode_rgb(read_image(sample[image_column])), image_size))
        except SkippedImage as error:
            skipped[error.reason] += 1
            continue
        labels.append(label)
    if not images:
        raise ValueError(
            f"{source} ({split}) holds no readable image in column {image_column!r}; skipped: {dict(skipped)}."
        )
    if skipped:
        total = sum(skipped.values())
        logger.warning(
            "%s (%s): skipped %d of %d images: %s", source, split, total, total + len(images), dict(skipped)
        )
    return LabelledImages(torch.stack(images), torch.tensor(labels), class_names, dict(skipped))


def _find_column(given: str | None, usual: Sequence[str], columns: list[str], kind: str, source: str) -> str:
    candidates = usual if given is None else (given,)
    for column in candidates:
        if column in columns:
            return column
    raise ValueError(
        f"{source} has no {kind} column among {list(candidates)}; it has {columns}. Name one with {kind}_column."
    )


@torch.no_grad()
def extract_summaries(
    encode: Callable[[torch.Tensor], torch.Tensor],
    images: torch.Tensor | Sequence[torch.Tensor],
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    description: str = "summaries",
) -> torch.Tensor:
    """Encode all images, in order; returns float32 (N, D) on the CPU.

    Args:
        encode: float images in [0, 1], (B, 3, H, W), on `device` -> summaries (B, D).
        images: uint8 (N, 3, H, W), or a sized sequence of uint8 batches (B, 3, H, W), whose sizes may differ
            (`batch_size` is then not used).

    Raises:
        ValueError: no images, images that are not uint8 (B, 3, H, W), or an encoder whose output is not finite (B, D).
    """
    if len(images) == 0:
        raise ValueError("There are no images to encode; expected at least one.")
    batches = images.split(batch_size) if isinstance(images, torch.Tensor) else images
    summaries = []
    for batch in tqdm(batches, desc=description, unit="batch"):
        if batch.dtype != torch.uint8 or batch.ndim != 4 or batch.shape[1] != 3:
            raise ValueError(f"A batch is {batch.dtype} {tuple(batch.shape)}; expected torch.uint8 (B, 3, H, W).")
        summary = encode(batch.to(device).float() / 255)
        if summary.ndim != 2 or len(summary) != len(batch):
            raise ValueError(f"encode returned {tuple(summary.shape)}; expected ({len(batch)}, D): one row an image.")
        if not summary.isfinite().all():
            raise ValueError("encode returned NaN or infinite summaries; check the weights, or use a wider dtype.")
        summaries.append(summary.float().cpu())
    return torch.cat(summaries)


def check_labelled(vectors: torch.Tensor, labels: torch.Tensor, name: str) -> None:
    """ValueError unless `vectors` is finite (N, D) with N > 0 and `labels` holds N class indices from 0."""
    if vectors.ndim != 2 or len(vectors) == 0:
        raise ValueError(f"The {name} have shape {tuple(vectors.shape)}; expected (N, D) with at least one row.")
    if labels.shape != vectors.shape[:1]:
        raise ValueError(f"There are {len(vectors)} {name} but labels of shape {tuple(labels.shape)}.")
    if labels.is_floating_point() or labels.is_complex() or labels.min() < 0:
        raise ValueError(f"The labels of the {name} must be integers from 0; got {labels.dtype}, {labels.min()}.")
    if not vectors.isfinite().all():
        raise ValueError(f"The {name} hold NaN or infinite values; check the encoder that produced them.")
