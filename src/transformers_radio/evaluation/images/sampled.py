"""A random sample of a labeled split that is decoded anew at every size, so that no size has to fit into memory."""

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from transformers_radio.data.images import SkippedImage
from transformers_radio.data.source import read_rgb

from .labeled import LabeledSplit, check_readable
from .resize import Size, stretch_image

FILES_SHUFFLED = 1000  # encoded images that are shuffled together; where rows are paths to files, the whole split is
SAMPLE_SEED = 0  # what tasks draw with


@dataclass
class LabeledFiles:
    """A sample of a labeled split, undecoded.

    Attributes:
        files: as `read_rgb` takes them (paths, or encoded images).
        labels: int64 (N,).
        class_names: in the order of the labels; None where the source does not state them.
        skipped: reason -> number of images that could not be read, which are not among `files`.
        unusable: which these are: (fingerprint of the split's files, place among them).
        split: that the sample is from.
    """

    files: list[Any]
    labels: torch.Tensor
    class_names: list[str] | None
    skipped: dict[str, int]
    unusable: set[tuple[str, str]]
    split: LabeledSplit

    def batches(self, size: Size, batch_size: int) -> "ResizedBatches":
        """All images at (height, width), as uint8 batches (B, 3, height, width)."""
        return ResizedBatches(self.files, size, batch_size)


class ResizedBatches(Sequence[torch.Tensor]):
    """Batches of whole images, stretched to one size and decoded when they are asked for."""

    def __init__(self, files: list[Any], size: Size, batch_size: int):
        self.files = files
        self.size = size
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.files) // self.batch_size)

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        files = self.files[index * self.batch_size : (index + 1) * self.batch_size]
        return torch.stack([stretch_image(read_rgb(file), self.size) for file in files])


def sample_labeled_files(split: LabeledSplit, limit: int | None = None, seed: int = SAMPLE_SEED) -> LabeledFiles:
    """Up to `limit` images of a split, drawn by the seed; all of them, in their order, without a limit.

    From local class folders any image may be drawn. Other sources are streamed: their parts come in random order, and
    within them 1,000 images are shuffled at a time, so that a source sorted by class gives a one-sided sample.

    Args:
        split: without a limit of its own.
        limit: number of readable images; None for all.

    Raises:
        ValueError: a limit below 1, a label that is not a class index, no readable image at all.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; expected at least 1, or None for the whole split.")
    files, labels, skipped, unusable = [], [], Counter[str](), set()

    def read(shard: int) -> Iterator[tuple[Any, tuple[int, str]]]:
        for number, (file, label) in enumerate(split.rows(shard)):
            yield file, (label, f"{shard}/{number}")

    in_order = itertools.chain.from_iterable(map(read, range(split.num_shards)))
    with tqdm(total=limit, desc=f"{split.source} {split.split}", unit=" images") as progress:
        for file, (label, place) in in_order if limit is None else shuffled(split.num_shards, read, seed):
            try:
                read_rgb(file)
            except SkippedImage as error:
                skipped[error.reason] += 1
                unusable.add((split.fingerprint()["files"], place))
                continue
            files.append(file)
            labels.append(label)
            progress.update()
            if len(files) == limit:
                break
    check_readable(split, len(files), skipped)
    return LabeledFiles(files, torch.tensor(labels), split.class_names, dict(skipped), unusable, split)


def shuffled(
    num_shards: int, read: Callable[[int], Iterable[tuple[Any, Any]]], seed: int = SAMPLE_SEED
) -> Iterator[tuple[Any, Any]]:
    """Yields every row once: parts in random order, and each row in exchange for one that waited.

    Args:
        read: the number of a part -> its rows, (undecoded image as `datasets` has it, anything).
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
