"""A random sample of a labelled split that is decoded anew at every size, so that no size has to fit into memory."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from transformers_radio.data.images import SkippedImage, decode_rgb
from transformers_radio.data.source import read_image

from .features import IMAGE_COLUMNS, LABEL_COLUMNS, _find_column

# Rows that are shuffled together: of paths to local files a whole split fits, of encoded images some.
PATHS_SHUFFLED = 10_000_000
FILES_SHUFFLED = 1000


@dataclass
class LabelledFiles:
    """`files` as `datasets` hands them over undecoded (paths, or encoded images); `labels` int64 (N,); `class_names`
    where the source states them; `skipped` images per reason (they are in neither)."""

    files: list[Any]
    labels: torch.Tensor
    class_names: list[str] | None
    skipped: dict[str, int]

    def batches(self, size: tuple[int, int], batch_size: int) -> "ResizedBatches":
        """All images at (height, width), as uint8 batches (B, 3, height, width)."""
        return ResizedBatches(self.files, size, batch_size)


class ResizedBatches(Sequence[torch.Tensor]):
    """Batches that are decoded when they are asked for. The whole image is scaled, bicubic; its aspect ratio goes."""

    def __init__(self, files: list[Any], size: tuple[int, int], batch_size: int):
        self.files = files
        self.size = size
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.files) // self.batch_size)

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        files = self.files[index * self.batch_size : (index + 1) * self.batch_size]
        return torch.stack([self._resize(decode_rgb(read_image(file))) for file in files])

    def _resize(self, image: Image.Image) -> torch.Tensor:
        height, width = self.size
        resized = image.resize((width, height), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(resized)).permute(2, 0, 1)  # (H, W, 3) -> (3, H, W)


def sample_labelled_files(
    source: str | Path,
    split: str,
    config_name: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> LabelledFiles:
    """Up to `limit` images of a split, in an order that depends on the seed alone.

    Of local class folders any image may be drawn. Other sources are streamed: their files come in random order, and
    within them 1,000 images are shuffled at a time, so that files in the order of their classes give a one-sided
    sample.

    Args:
        source, split, image_column, label_column: as in `load_labelled_images`.
        config_name: the configuration of a Hub dataset that has several.
        limit: number of images; None for all.

    Raises:
        ValueError: no image or label column, a label that is not a class index, no readable image at all.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; expected at least 1, or None for the whole split.")
    stream = datasets.load_dataset(str(source), config_name, split=split, streaming=True)
    columns = list(stream.features or next(iter(stream)))
    image_column = _find_column(image_column, IMAGE_COLUMNS, columns, "image", str(source))
    label_column = _find_column(label_column, LABEL_COLUMNS, columns, "label", str(source))
    class_names = getattr((stream.features or {}).get(label_column), "names", None)
    stream = stream.select_columns([image_column, label_column])
    stream = stream.cast_column(image_column, datasets.Image(decode=False))
    first = next(iter(stream), None)
    if first is None:
        raise ValueError(f"{source} ({split}) is empty.")
    if limit is not None:
        are_paths = first[image_column]["bytes"] is None
        stream = stream.shuffle(seed=seed, buffer_size=PATHS_SHUFFLED if are_paths else FILES_SHUFFLED)

    files, labels, skipped = [], [], Counter[str]()
    progress = tqdm(total=limit, desc=f"{source} {split}", unit=" images")
    for sample in stream:
        label = sample[label_column]
        if isinstance(label, bool) or not isinstance(label, int) or label < 0:
            raise ValueError(
                f"{label!r} in column {label_column!r} of {source} ({split}) is no class index; expected an integer "
                "from 0. Choose another label_column, or a split with labels."
            )
        try:
            decode_rgb(read_image(sample[image_column]))
        except SkippedImage as error:
            skipped[error.reason] += 1
            continue
        files.append(sample[image_column])
        labels.append(label)
        progress.update()
        if len(files) == limit:
            break
    progress.close()
    if not files:
        raise ValueError(
            f"{source} ({split}) holds no readable image in column {image_column!r}; skipped: {dict(skipped)}."
        )
    return LabelledFiles(files, torch.tensor(labels), class_names, dict(skipped))
