"""Labelled images at the protocol's resize, and the summary vector of each of them."""

import itertools
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from transformers_radio.data import DataConfig, SourceConfig, count_images
from transformers_radio.data.errors import ColumnError
from transformers_radio.data.files import kind_of
from transformers_radio.data.images import SkippedImage, decode_rgb
from transformers_radio.data.source import EVERY_RECORD, read_image
from transformers_radio.data.tars import find_fields, read_samples

from .split_files import class_names, find_split, in_words_of_evaluation, load_builder, naming

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


def resize_shortest(image: Image.Image, side: int, step: int) -> torch.Tensor:
    """Resize an RGB image with bicubic interpolation so that its shortest side is `side` pixels; uint8 (3, H, W).

    The aspect ratio stays, but for what it takes to round height and width to multiples of `step`.
    """
    scale = side / min(image.size)
    width, height = (max(1, round(length * scale / step)) * step for length in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()  # (H, W, 3) -> (3, H, W)


# Parts of a split's fingerprint: all but the place, the name of the split and that of the configuration, which show in
# the files.
COUNTED = ("columns", "limit", "files")


class LabelledSplit:
    """A split of a classification set: undecoded images with their class indices, in parts that are read on their own.

    Args:
        source: class folders of images, WebDataset tars with `.cls` files, or Parquet: a path, a pattern or a URL as
            training reads them; or a folder or Hub id that only `datasets.load_dataset` understands. It is streamed,
            so nothing is copied into a cache.
        split: such as `"train"` or `"validation"`.
        name: the configuration of a Hub dataset that has several.
        image_column, label_column: found among the usual names unless given.
        limit: read only the first samples. Class folders come class by class, so there it means the first classes.

    Attributes:
        num_shards: parts of the split, such as files of tars or Parquet.
        class_names: when the source states them.
        num_classes: labels must be below it; None to take any. It may be set.
        stated: number of images, when the source states it.

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
        self._stream: Any = None  # of class folders the names of the files are enough
        self._fields: list[str] | None = None  # of tars, the extensions of images
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
            # Undecoded, so that one broken file is one skipped image and not the end of the run.
            stream = self._stream.select_columns([self.image_column, self.label_column])
            stream = stream.cast_column(self.image_column, datasets.Image(decode=False))
            self.num_shards = stream.num_shards if limit is None else 1  # a limited stream ends where the whole does
            self._stream = stream if limit is None else stream.take(limit)
        self.num_classes = None if self.class_names is None else len(self.class_names)

    def _open_tars(self, image_column: str | None) -> list[str]:
        """The fields of images. As in training, of a sample the image alone is decoded, whatever its extension."""
        config = SourceConfig(path=self.source, image_column=image_column)
        try:
            return find_fields(self._found.files, config, "data")
        except ColumnError as error:
            raise ValueError(in_words_of_evaluation(str(error))) from error

    def _open(self, name: str | None) -> list[str]:
        """Opens the stream of a table; its columns."""
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
        """(image as `read_image` takes it, class index) of the split or of one of its parts, in a fixed order.

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
                f"{label!r} in column {self.label_column!r} of {self.source} ({self.split}) is no class index; "
                f"expected an integer from 0{last}. Choose another label_column, or a split with labels."
            )
        return label

    def count(self) -> int | None:
        """Number of images, readable or not, where the source states it or local files show it; None otherwise."""
        if self.stated is not None:
            return self.stated
        count, files = None, self._found.files
        kinds = {kind_of(file) for file in files} - {None}  # beside images there may be a table of metadata
        if kinds == {"imagefolder"}:
            count = sum(kind_of(file) is not None for file in files)
        elif kinds <= {"webdataset", "parquet"} and files and not any("://" in file for file in files):
            sources = {str(number): SourceConfig(path=file) for number, file in enumerate(files)}
            count = count_images(DataConfig(sources=sources))
        return count if count is None or self.limit is None else min(count, self.limit)

    def labels_of_folders(self) -> set[int] | None:
        """The labels that occur, readable images or not, where class folders show them by their names; else None."""
        return None if self._stream is not None else {label for _, label in self.rows()}

    def fingerprint(self) -> dict[str, Any]:
        """What is read. `COUNTED` names the parts that the rows depend on; of files these are names, sizes and dates
        below the source, or the revision on the Hub."""
        return {
            "source": self.source,
            "split": self.split,
            "configuration": self.configuration,
            "columns": [self.image_column, self.label_column],
            "limit": self.limit,
            "files": self._found.fingerprint,
        }

    def recognized(self, fingerprint: Any) -> Any:
        """A fingerprint in a file, with the hash of today where it has that of earlier versions for these files."""
        if not isinstance(fingerprint, dict) or fingerprint.get("files") == self._found.fingerprint:
            return fingerprint
        places = {self._found.folder, str(fingerprint.get("source"))}
        if fingerprint.get("files") in {self._found.fingerprint_before(place) for place in places}:
            return {**fingerprint, "files": self._found.fingerprint}
        return fingerprint


def _class_index(text: bytes | None) -> int | str | None:
    """The number in a tar's label file; what it holds instead, or None without one."""
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
        source, split, name, image_column, label_column, limit: see `LabelledSplit`.
        image_size: see `resize_image`. A split takes N * 3 * H * W bytes of memory.

    Raises:
        FileNotFoundError: no such source.
        ValueError: no image or label column, a label that is not a class index, no readable image at all.
    """
    sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(sides) != 2 or min(sides) < 1:
        raise ValueError(f"image_size is {image_size!r}; give one side or (height, width), in pixels, at least 1.")
    rows = LabelledSplit(source, split, name, image_column, label_column, limit)
    images, labels, skipped = [], [], Counter[str]()
    for image, label in tqdm(rows.rows(), desc=f"{source} {split}", unit=" images", total=limit):
        try:
            images.append(resize_image(decode_rgb(read_image(image)), image_size))
        except SkippedImage as error:
            skipped[error.reason] += 1
            continue
        labels.append(label)
    if not images:
        raise ValueError(
            f"{source} ({split}) holds no readable image in column {rows.image_column!r}; skipped: {dict(skipped)}."
        )
    warn_of_skipped(f"{source} ({split})", len(images), skipped)
    return LabelledImages(torch.stack(images), torch.tensor(labels), rows.class_names, dict(skipped))


def warn_of_skipped(what: str, used: int, skipped: dict[str, int]) -> None:
    if skipped:
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
