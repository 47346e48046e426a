"""Segmentation sets: folders of images and masks (ADE20K, PASCAL VOC), or any `datasets` source with both columns."""

from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torchvision.transforms.v2.functional import pil_to_tensor

from transformers_radio.data.images import EXTENSIONS, SkippedImage
from transformers_radio.data.source import read_image, read_rgb
from transformers_radio.disk import digest
from transformers_radio.evaluation.images.split_files import find_split
from transformers_radio.evaluation.models.specs import folder_or_hub
from transformers_radio.evaluation.paths import expand_home
from transformers_radio.modeling.decoding_radio import load_pixels, open_image

from .config import SegmentationData, SplitSource
from .miou import reduce_labels


class Sample(NamedTuple):
    """An image with its label map."""

    image: torch.Tensor  # uint8 (3, H, W)
    mask: torch.Tensor  # int64 (H, W), class indices or the ignore index
    key: str  # what messages call the image


class Samples(Protocol):
    """A split: a `SegmentationSplit`, a list of `Sample`, or anything else with a length and numbered samples."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...


class SegmentationSplit:
    """The samples of a split by number, decoded when asked for; `len(split)` of them, in a fixed order.

    Raises:
        FileNotFoundError: a folder, a file of names, or the mask of an image is missing.
        ValueError: an unknown or empty split, or a column that is not there.
    """

    def __init__(self, data: SegmentationData, split: str):
        if split not in data.splits:
            raise ValueError(f"{data.name} has no split {split!r}; it has {', '.join(data.splits)}.")
        self.data = data
        self.name = split
        self.parts = [_open_part(data, part) for part in data.splits[split]]
        if not sum(map(len, self.parts)):
            raise ValueError(
                f"The split {split!r} of {data.name} at {data.path} is empty; check data.path and its splits."
            )

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, index: int) -> Sample:
        """
        Raises:
            IndexError: from `len` on.
            ValueError: an image or mask that cannot be read, a mask of another size than its image, or ids that are
                not classes. Nothing is skipped: every pixel of a benchmark counts.
        """
        for part in self.parts:
            if index < len(part):
                return self._read(*part[index])
            index -= len(part)
        raise IndexError("no such sample")

    def fingerprint(self) -> str:
        """A hash of names, sizes and dates of the files that the samples are read from. Moving them keeps it."""
        return digest(repr(part.fingerprint()) for part in self.parts)

    def recognized(self, fingerprint: Any) -> Any:
        """A fingerprint from a file, with today's in place of the one that earlier versions gave these files: they
        took what `datasets` calls the rows of a table."""
        if fingerprint == self.fingerprint() or not any(isinstance(part, _Table) for part in self.parts):
            return fingerprint
        before = digest(
            repr(part.fingerprint_before() if isinstance(part, _Table) else part.fingerprint()) for part in self.parts
        )
        return self.fingerprint() if fingerprint == before else fingerprint

    def _read(self, image_file: Any, mask_file: Any, key: str) -> Sample:
        try:
            image = pil_to_tensor(read_rgb(image_file)).contiguous()  # (3, H, W)
        except SkippedImage as error:
            raise ValueError(f"The image {key} of {self.data.name} cannot be used: {error.reason}.") from None
        mask = self._read_mask(read_image(mask_file), key)
        if mask.shape != image.shape[1:]:
            raise ValueError(
                f"The mask of {key} is {mask.shape[0]}x{mask.shape[1]} and its image {image.shape[1]}x"
                f"{image.shape[2]} (height x width, upright); they must be of one size."
            )
        return Sample(image, mask, key)

    def _read_mask(self, content: bytes, key: str) -> torch.Tensor:
        """int64 (H, W): class indices or ignore_index."""
        try:
            picture = open_image(content)
            load_pixels(picture)
        except SkippedImage as error:
            raise ValueError(f"The mask of {key} cannot be read: {error}") from error
        if picture.mode not in ("L", "P", "1", "I") and not picture.mode.startswith("I;16"):
            raise ValueError(
                f"The mask of {key} has mode {picture.mode}; expected one channel whose values are class ids (gray, "
                "palette or 16 bit), not colors."
            )
        ids = torch.from_numpy(np.array(picture).astype(np.int64))  # a palette image gives its indices
        first = 1 if self.data.reduce_labels else 0
        last = first + len(self.data.classes) - 1
        known = (ids >= 0) & (ids <= last) | (ids == self.data.ignore_index)
        if not known.all():
            raise ValueError(
                f"The mask of {key} has the id {ids[~known][0].item()}, but {self.data.name} has "
                f"{len(self.data.classes)} classes: expected {first} to {last}"
                f"{', 0 for no class' if first else ''} or {self.data.ignore_index} for pixels left out. Check "
                "data.classes, data.reduce_labels and data.ignore_index."
            )
        return reduce_labels(ids, self.data.ignore_index) if first else ids


def data_settings(data: SegmentationData, *splits: SegmentationSplit) -> dict[str, Any]:
    """What results depend on, of a set that is called `data.name`."""
    return {
        "classes": data.classes,
        "reduce_labels": data.reduce_labels,
        "ignore_index": data.ignore_index,
        **{f"{split.name} files": split.fingerprint() for split in splits},
    }


def _open_part(data: SegmentationData, part: SplitSource):
    if part.split is not None:
        return _Table(data, part)
    if part.images is None or part.masks is None:
        raise ValueError(f"A split of {data.name} needs the folders `images` and `masks`, or `split` of a data set.")
    return _Pairs(_list_pairs(Path(expand_home(data.path)), part))


class _Pairs(list[tuple[str, str, str]]):
    """(image file, mask file, name) of the images of a folder."""

    def fingerprint(self) -> list[tuple[str, int, int]]:
        """(name, size, date) of each file, without its folder, which may be moved."""
        dated = [(name, Path(file).stat()) for image, mask, name in self for file in (image, mask)]
        return [(name, status.st_size, status.st_mtime_ns) for name, status in dated]


def _list_pairs(root: Path, part: SplitSource) -> list[tuple[str, str, str]]:
    """(image file, mask file, name) of the images of the folder, or of those in the file of names."""
    folder, masks = root / str(part.images), root / str(part.masks)
    for directory in (folder, masks):
        if not directory.is_dir():
            raise FileNotFoundError(f"There is no folder {directory}; set data.path to where the set was unpacked.")
    files = {
        path.relative_to(folder).with_suffix("").as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in EXTENSIONS and not path.name.startswith(".")
    }
    if part.names is not None:
        lines = (root / part.names).read_text(encoding="utf-8").splitlines()
        listed = [line.strip() for line in lines if line.strip()]
        absent = [name for name in listed if name not in files]
        if absent:
            raise FileNotFoundError(
                f"{len(absent)} images named in {root / part.names} are not in {folder}, such as {absent[0]}."
            )
        files = {name: files[name] for name in listed}
    pairs = [(str(path), str(masks / f"{name}.png"), name) for name, path in files.items()]
    absent = [mask for _, mask, _ in pairs if not Path(mask).is_file()]
    if absent:
        raise FileNotFoundError(f"{len(absent)} of {len(pairs)} images have no mask, such as {absent[0]}.")
    return pairs


class _Table:
    """(image, mask, key) of the rows of a `datasets` source; images as `read_image` takes them."""

    def __init__(self, data: SegmentationData, part: SplitSource):
        import datasets

        assert part.split is not None
        self.data, self.part = data, part
        self.found = find_split(data.path, part.split, part.config_name)
        with folder_or_hub(self.found.source):
            rows = datasets.load_dataset(**self.found.load_arguments(part.config_name), split=part.split)
        for column in (part.image_column, part.mask_column):
            if column not in rows.column_names:
                raise ValueError(
                    f"{data.path} has no column {column!r}; it has {', '.join(rows.column_names)}. Set image_column "
                    "and mask_column."
                )
        self.rows = self._undecoded(rows)

    def _undecoded(self, rows):
        import datasets

        for column in (self.part.image_column, self.part.mask_column):
            rows = rows.cast_column(column, datasets.Image(decode=False))
        return rows.select_columns([self.part.image_column, self.part.mask_column])

    def __len__(self) -> int:
        return len(self.rows)

    def fingerprint(self) -> tuple[str, str, str]:
        """(hash of the files, image column, mask column); without files, the hash that `datasets` gives the rows."""
        files = self.found.fingerprint if self.found.files else self.rows._fingerprint
        return files, self.part.image_column, self.part.mask_column

    def fingerprint_before(self) -> str | None:
        """The fingerprint of earlier versions; None where the rows cannot be opened as they did."""
        import datasets

        try:
            rows = datasets.load_dataset(self.found.source, self.part.config_name, split=self.part.split)
        except (OSError, ValueError):
            return None
        return self._undecoded(rows)._fingerprint

    def __getitem__(self, index: int) -> tuple[Any, Any, str]:
        row = self.rows[index]
        image, mask = row[self.part.image_column], row[self.part.mask_column]
        return image, mask, f"{self.part.split}[{index}] ({image.get('path') or 'no file name'})"
