"""A random sample of a labelled split that is decoded anew at every size, so that no size has to fit into memory."""

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from transformers_radio.data.images import SkippedImage, decode_rgb
from transformers_radio.data.source import read_image

from .labelled import LabelledSplit, warn_of_skipped

FILES_SHUFFLED = 1000  # encoded images that are shuffled together; of paths to local files, the whole split
SAMPLE_SEED = 0  # of what tasks draw


@dataclass
class LabelledFiles:
    """`files` as `datasets` hands them over undecoded (paths, or encoded images); `labels` int64 (N,); `class_names`
    where the source states them; `skipped` images per reason (they are in neither), and `unusable`, which these are;
    `split` is the whole of it."""

    files: list[Any]
    labels: torch.Tensor
    class_names: list[str] | None
    skipped: dict[str, int]
    unusable: set[tuple[str, str]]  # (fingerprint of the split's files, place among them)
    split: LabelledSplit

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
    name: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    limit: int | None = None,
    seed: int = SAMPLE_SEED,
) -> LabelledFiles:
    """Up to `limit` images of a split, drawn by the seed; all of them, in their order, without a limit.

    Of local class folders any image may be drawn. Other sources are streamed: their parts come in random order, and
    within them 1,000 images are shuffled at a time, so that parts in the order of their classes give a one-sided
    sample.

    Args:
        source, split, name, image_column, label_column: see `features.LabelledSplit`.
        limit: number of readable images; None for all.

    Raises:
        FileNotFoundError: no such source.
        ValueError: no image or label column, a label that is not a class index, no readable image at all.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; expected at least 1, or None for the whole split.")
    rows = LabelledSplit(source, split, name, image_column, label_column)
    files, labels, skipped, unusable = [], [], Counter[str](), set()

    def read(shard: int) -> Iterator[tuple[Any, tuple[int, str]]]:
        for number, (file, label) in enumerate(rows.rows(shard)):
            yield file, (label, f"{shard}/{number}")

    in_order = itertools.chain.from_iterable(map(read, range(rows.num_shards)))
    with tqdm(total=limit, desc=f"{source} {split}", unit=" images") as progress:
        for file, (label, place) in in_order if limit is None else shuffled(rows.num_shards, read, seed):
            try:
                decode_rgb(read_image(file))
            except SkippedImage as error:
                skipped[error.reason] += 1
                unusable.add((rows.fingerprint()["files"], place))
                continue
            files.append(file)
            labels.append(label)
            progress.update()
            if len(files) == limit:
                break
    if not files:
        raise ValueError(
            f"{source} ({split}) holds no readable image in column {rows.image_column!r}; skipped: {dict(skipped)}."
        )
    warn_of_skipped(f"{source} ({split})", len(files), skipped)
    return LabelledFiles(files, torch.tensor(labels), rows.class_names, dict(skipped), unusable, rows)


def shuffled(
    num_shards: int, read: Callable[[int], Iterable[tuple[Any, Any]]], seed: int = SAMPLE_SEED
) -> Iterator[tuple[Any, Any]]:
    """Every row once; parts in random order, and each row in exchange for one that waited.

    Args:
        read: the number of a part -> its rows, (image as `datasets` hands it over undecoded, anything).
    """
    generator = random.Random(seed)
    waiting: list[tuple[Any, Any]] = []
    for shard in generator.sample(range(num_shards), num_shards):
        for row in read(shard):
            is_path = isinstance(row[0], dict) and row[0].get("bytes") is None
            if is_path or len(waiting) < FILES_SHUFFLED:
                waiting.append(row)
                continue
            place = generator.randrange(len(waiting))
            yield waiting[place]
            waiting[place] = row
    generator.shuffle(waiting)
    yield from waiting
