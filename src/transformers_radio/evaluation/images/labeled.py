"""Labeled images: a split of a classification set, read part by part or loaded into memory."""

import itertools
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from tqdm import tqdm

from transformers_radio.data import DataConfig, SourceConfig, count_images
from transformers_radio.data.errors import ColumnError
from transformers_radio.data.files import kind_of
from transformers_radio.data.images import SkippedImage
from transformers_radio.data.source import EVERY_RECORD, read_rgb
from transformers_radio.data.tars import find_fields, read_samples

from .resize import cover_image, stretch_image
from .split_files import class_names, find_split, in_words_of_evaluation, load_builder, naming

logger = logging.getLogger(__name__)

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")
LABEL_COLUMNS = ("label", "labels", "cls")
# Parts of a split's fingerprint that results are known by: all but its place, its name and that of its configuration,
# as the files say which images these are.
COUNTED = ("columns", "limit", "files")


@dataclass
class LabelledImages:
    """A split in memory.

    Attributes:
        images: uint8 (N, 3, H, W).
        labels: int64 (N,).
        class_names: in the order of the labels; None where the source does not state them.
        skipped: reason -> number of images that could not be read, which are not among `images`.
    """

    images: torch.Tensor
    labels: torch.Tensor
    class_names: list[str] | None
    skipped: dict[str, int]


class LabeledSplit:
    """A split of a classification set: undecoded images with their class indices, in parts that are read on their own.

    Args:
        source: class folders of images, WebDataset tars with `.cls` files, or Parquet: a path, a pattern or a URL as
            training reads them; or a folder or Hub id that only `datasets.load_dataset` understands. It is streamed,
            so nothing is copied into a cache.
        split: such as `"train"` or `"validation"`.
        name: the configuration of a Hub dataset that has several.
        image_column, label_column: found among the usual names unless given.
        limit: read only the first samples. Class folders come class by class, so there these are of the first classes.

    Attributes:
        num_shards: parts of the split, such as its tars or Parquet files.
        class_names: in the order of the labels; None where the source does not state them.
        num_classes: labels must be below it; None to take any. Callers may set it.
        stated: number of images; None where the source does not state it.

    Raises:
        FileNotFoundError: no such source. ValueError: no such split, image or label column, or a limit below 1.
    """

    def __init__(
        self,
        source: str | Path,
        split: str,
        name: str | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
        limit: int | None = None,
    ):
        if limit is not None and limit < 1:
            raise ValueError(f"limit is {limit}; expected at least 1, or None for the whole split.")
        self._found = find_split(source, split, name)
        self.source, self.split, self.limit = self._found.source, split, limit
        self.configuration, self.stated, self.num_shards = name or "default", None, 1
        self.class_names = class_names(self._found)
        self._stream: Any = None  # of `datasets`; class folders need none, as the names of their files are enough
        self._fields: list[str] | None = None  # the extensions of images, where the split is made of tars
        columns = ["image", "label"]
        if self._found.kind == "webdataset":
            self._fields = self._open_tars(image_column)
            self.image_column, self.label_column = self._fields[0], label_column or "cls"
            self.num_shards, self.num_classes = len(self._found.files) if limit is None else 1, None
            self._is_given = image_column is not None
            return
        if self.class_names is None:
            columns = self._open(name)
        self.image_column = _find_column(image_column, IMAGE_COLUMNS, columns, "image", str(source))
        self.label_column = _find_column(label_column, LABEL_COLUMNS, columns, "label", str(source))
        if self._stream is not None:
            label = (self._stream.features or {}).get(self.label_column)
            self.class_names = getattr(label, "names", None)
            # undecoded, so that one broken file is one skipped image and not the end of the run
            stream = self._stream.select_columns([self.image_column, self.label_column])
            stream = stream.cast_column(self.image_column, datasets.Image(decode=False))
            self.num_shards = stream.num_shards if limit is None else 1  # a limited stream ends where the whole does
            self._stream = stream if limit is None else stream.take(limit)
        self.num_classes = None if self.class_names is None else len(self.class_names)

    def _open_tars(self, image_column: str | None) -> list[str]:
        """The fields of images. As in training, only the image of a sample is decoded, whatever its extension."""
        config = SourceConfig(path=self.source, image_column=image_column)
        try:
            return find_fields(self._found.files, config, "data")
        except ColumnError as error:
            raise ValueError(in_words_of_evaluation(str(error))) from error

    def _open(self, name: str | None) -> list[str]:
        """Opens the stream of a table, and returns its columns."""
        with naming(self._found):
            builder = load_builder(self._found, name)
            stream = builder.as_streaming_dataset(split=self.split)
            first = None if stream.features else next(iter(stream), None)
        columns = list(stream.features or first or ())
        if not columns:
            raise ValueError(f"{self.source} ({self.split}) is empty; check the folder and the split.")
        info = (builder.info.splits or {}).get(self.split)
        self.stated = info.num_examples or None if info is not None else None
        if self.stated is not None and self.limit is not None:
            self.stated = min(self.stated, self.limit)
        self._stream, self.configuration = stream, builder.config.name
        self._found.take_files((builder.config.data_files or {}).get(self.split, []))
        return columns

    def rows(self, shard: int | None = None) -> Iterator[tuple[Any, int]]:
        """Yields (image as `read_rgb` takes it, class index) of the split or of one of its parts, in a fixed order.

        Raises:
            ValueError: a label that is not a class index.
        """
        if self._fields is not None:
            files = self._found.files if shard is None or self.num_shards == 1 else [self._found.files[shard]]
            samples = (
                sample
                for file in files
                for sample in read_samples(file, self._fields or [], self._is_given, EVERY_RECORD, self.label_column)
            )
            for _, image, text in itertools.islice(samples, self.limit):
                yield {"bytes": image or b"", "path": None}, self._checked_label(_class_index(text))
            return
        if self._stream is None:
            numbers = {name: number for number, name in enumerate(self.class_names or [])}
            for file in self._found.files[: self.limit]:
                yield {"path": file, "bytes": None}, numbers[os.path.basename(os.path.dirname(file))]
            return
        whole = shard is None or self.num_shards == 1
        with naming(self._found):
            for sample in self._stream if whole else self._stream.shard(self.num_shards, shard):
                yield sample[self.image_column], self._checked_label(sample[self.label_column])

    def _checked_label(self, label: Any) -> int:
        is_index = isinstance(label, int) and not isinstance(label, bool) and label >= 0
        if not is_index or (self.num_classes is not None and label >= self.num_classes):
            last = "" if self.num_classes is None else f" to {self.num_classes - 1}"
            raise ValueError(
                f"{label!r} in column {self.label_column!r} of {self.source} ({self.split}) is not a class index; "
                f"expected an integer from 0{last}. Choose another label_column, or a split with labels."
            )
        return label

    def count(self) -> int | None:
        """Number of images, readable or not, where the source states it or local files show it; None otherwise."""
        if self.stated is not None:
            return self.stated
        count, files = None, self._found.files
        kinds = {kind_of(file) for file in files} - {None}  # a table of metadata may lie beside images
        if kinds == {"imagefolder"}:
            count = sum(kind_of(file) is not None for file in files)
        elif kinds <= {"webdataset", "parquet"} and files and not any("://" in file for file in files):
            sources = {str(number): SourceConfig(path=file) for number, file in enumerate(files)}
            count = count_images(DataConfig(sources=sources))
        return count if count is None or self.limit is None else min(count, self.limit)

    def labels_of_folders(self) -> set[int] | None:
        """The labels of all images, readable or not, where the names of class folders show them; None elsewhere."""
        return None if self._stream is not None else {label for _, label in self.rows()}

    def fingerprint(self) -> dict[str, Any]:
        """What is read. `COUNTED` names the parts that the rows depend on. "files" is a hash of the names below the
        source, sizes and dates of the files, or of their revision on the Hub."""
        return {
            "source": self.source,
            "split": self.split,
            "configuration": self.configuration,
            "columns": [self.image_column, self.label_column],
            "limit": self.limit,
            "files": self._found.fingerprint,
        }

    def recognized(self, fingerprint: Any) -> Any:
        """A fingerprint from a file, with today's hash in place of the one that earlier versions gave these files."""
        if not isinstance(fingerprint, dict) or fingerprint.get("files") == self._found.fingerprint:
            return fingerprint
        places = {self._found.folder, str(fingerprint.get("source"))}
        if fingerprint.get("files") in {self._found.fingerprint_before(place) for place in places}:
            return {**fingerprint, "files": self._found.fingerprint}
        return fingerprint


def _class_index(text: bytes | None) -> int | str | None:
    """The number in a tar's label file; else what the file holds; None without a file."""
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        return text[:40].decode(errors="replace")


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
        source, split, name, image_column, label_column, limit: see `LabeledSplit`.
        image_size: (H, W) to scale each image until it covers H x W and cut out the center (the aspect ratio stays),
            or one number for exactly that square (the aspect ratio is lost). In pixels; bicubic. A split takes
            N * 3 * H * W bytes of memory.

    Raises:
        FileNotFoundError: no such source.
        ValueError: no image or label column, a label that is not a class index, no readable image at all.
    """
    sides = (image_size, image_size) if isinstance(image_size, int) else image_size
    if len(sides) != 2 or min(sides) < 1:
        raise ValueError(f"image_size is {image_size!r}; give one side or (height, width), in pixels, at least 1.")
    resize = stretch_image if isinstance(image_size, int) else cover_image
    rows = LabeledSplit(source, split, name, image_column, label_column, limit)
    images, labels, skipped = [], [], Counter[str]()
    for image, label in tqdm(rows.rows(), desc=f"{source} {split}", unit=" images", total=limit):
        try:
            images.append(resize(read_rgb(image), sides))
        except SkippedImage as error:
            skipped[error.reason] += 1
            continue
        labels.append(label)
    check_readable(rows, len(images), skipped)
    return LabelledImages(torch.stack(images), torch.tensor(labels), rows.class_names, dict(skipped))


def check_readable(split: LabeledSplit, used: int, skipped: Mapping[str, int], quiet: bool = False) -> None:
    """ValueError unless some image could be read; a warning about those that could not, unless `quiet`.

    Args:
        used: number of images that could be read.
        skipped: reason -> number of the others.
    """
    what = f"{split.source} ({split.split})"
    if not used:
        raise ValueError(f"{what} holds no readable image in column {split.image_column!r}; skipped: {dict(skipped)}.")
    if skipped and not quiet:
        total = sum(skipped.values())
        logger.warning("%s: skipped %d of %d images: %s", what, total, total + used, dict(skipped))


def _find_column(given: str | None, usual: Sequence[str], columns: list[str], kind: str, source: str) -> str:
    candidates = usual if given is None else (given,)
    for column in candidates:
        if column in columns:
            return column
    raise ValueError(
        f"{source} has no {kind} column among {list(candidates)}; it has {columns}. Name one with {kind}_column."
    )
