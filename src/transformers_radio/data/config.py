"""Which images are read, and how they are cropped and shuffled."""

import re
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

PATH = {
    "help": "A folder of images (nested or not), a webdataset tar or a parquet file, a folder of such files, a glob "
    "pattern or {000..999} range of any of these, a .txt file with one of these in each line, the URL of any of them, "
    "or the id of a dataset on the Hub."
}
SPLIT = {
    "help": "Of a Hub dataset, its split. Of a folder: the sub-folder of this name if there is one; else the tar or "
    "parquet files whose names start with it; else, for train, everything."
}
NAME = {"help": "The configuration of a Hub dataset that has several."}
IMAGE_COLUMN = {"help": "The column, or in tars the extension, of the image. null: the only one that holds images."}
IMAGE_ROOT = {
    "help": "The folder that paths in a parquet file start from. Files outside of it are not opened. null: the folder "
    "of the parquet files."
}


@dataclass
class SourceConfig:
    """One data set of a mixture."""

    path: str = field(default=MISSING, metadata=PATH)
    split: str = field(default="train", metadata=SPLIT)
    name: str | None = field(default=None, metadata=NAME)
    image_column: str | None = field(default=None, metadata=IMAGE_COLUMN)
    weight: float = field(
        default=1.0, metadata={"help": "Share of the images that come from here, relative to the other sets' weights."}
    )
    image_root: str | None = field(default=None, metadata=IMAGE_ROOT)


@dataclass
class DataConfig:
    """Which images are read, and how they are cropped and shuffled."""

    path: str | None = field(default=None, metadata=PATH)
    split: str = field(default="train", metadata=SPLIT)
    name: str | None = field(default=None, metadata=NAME)
    image_column: str | None = field(default=None, metadata=IMAGE_COLUMN)
    num_workers: int = field(
        default=2,
        metadata={"help": "Processes per rank that read and decode. 0: the training process does it itself."},
    )
    shuffle_window: int = field(
        default=1000,
        metadata={
            "help": "Samples of a shard that are read ahead and shuffled together; a worker holds this many undecoded "
            "files in memory for each of its lanes (image folders: only their names)."
        },
    )
    # The paper (section 4, "General") applies "random scale + cropping" and gives no ranges: these are ours. Half of
    # the area or more keeps a crop a picture of the same scene, at scales that the teachers know.
    crop_scale: tuple[float, float] = field(
        default=(0.5, 1.0),
        metadata={"help": "Share of the image's area that the random crop covers, smallest and largest."},
    )
    crop_ratio: tuple[float, float] = field(
        default=(3 / 4, 4 / 3), metadata={"help": "Width / height of the crop, smallest and largest."}
    )
    # not in the paper; mirrored text would be a wrong target for CLIP
    horizontal_flip: bool = field(default=False, metadata={"help": "Mirror half of the crops."})
    frozen_crops: bool = field(
        default=False, metadata={"help": "The crop of an image is the same in every epoch, whatever the seed."}
    )
    max_skipped_share: float = field(
        default=0.01,
        metadata={
            "help": "The run stops when more than this share of the images (of one data set) could not be used."
        },
    )
    min_side: int = field(
        default=16, metadata={"help": "Images with a shorter side than this, in pixels, are skipped."}
    )
    lanes: int | None = field(
        default=None,
        metadata={
            "help": "Number of parallel sequences that the source is divided into. The order of the images depends on "
            "it, and not on the number of processes or workers. null: as many as there are workers in all."
        },
    )
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    retry_seconds: float = field(
        default=300.0,
        metadata={"help": "How long requests to a failing server are repeated before the run stops. 0: not at all."},
    )
    max_pixels: int = field(
        default=120_000_000,
        metadata={"help": "Images with more pixels (width x height) are skipped before they are decoded."},
    )
    image_root: str | None = field(default=None, metadata=IMAGE_ROOT)

    def named_sources(self) -> dict[str, SourceConfig]:
        """Name -> data set, sorted by name; a single one that `path` gives has the name ""."""
        if self.sources:
            return dict(sorted(self.sources.items()))
        return {"": SourceConfig(self.path or "", self.split, self.name, self.image_column, 1.0, self.image_root)}

    def validate(self) -> None:
        """Raises ValueError that names the first field out of range."""
        if (self.path not in (None, "", MISSING)) == bool(self.sources):
            raise ValueError(
                f"data.path={self.path!r} and data.sources={sorted(self.sources)}: expected one of the two. data.path"
                " is a folder, file, pattern or Hub dataset id; data.sources mixes several of them by weight."
            )
        self._validate_sources()
        # field -> smallest, largest, what messages say
        whole = {
            "num_workers": (0, 1024, "0 or more, at most 1024"),
            "shuffle_window": (1, 10**7, "1 (no shuffling within a shard) or more, at most 10 million"),
            "min_side": (1, 2**16, "1 pixel or more, at most 65536"),
            # beyond it Pillow has a limit of its own
            "max_pixels": (1, 178_956_970, "1 to 178956970 pixels"),
            "lanes": (1, 10**5, "empty (None) or 1 or more, at most 100000"),
        }
        numbers = {
            "max_skipped_share": (0, 1, "a share between 0 and 1"),
            "retry_seconds": (0, 10**9, "0 (give up at once) or more seconds"),
        }
        for name, (low, high, expected) in {**whole, **numbers}.items():
            value = getattr(self, name)
            if not (name == "lanes" and value is None) and not _within(value, low, high, only_whole=name in whole):
                raise ValueError(f"data.{name}={value!r}: expected {expected}.")
        for name, largest, expected in (
            ("crop_scale", 1, "shares 0 < smallest <= largest <= 1"),
            # an image of a single row of pixels has no more
            ("crop_ratio", 10**5, "two numbers 0 < smallest <= largest, at most 100000"),
        ):
            pair = getattr(self, name)
            if not (
                isinstance(pair, tuple | list)
                and len(pair) == 2
                and all(_within(value, 0, largest) for value in pair)
                and 0 < pair[0] <= pair[1]
            ):
                raise ValueError(f"data.{name}={pair!r}: expected {expected}.")

    def _validate_sources(self) -> None:
        for name, source in self.sources.items():
            if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                raise ValueError(f"data.sources: {name!r} is not a name; expected letters, digits, _ and -.")
            if source.path in (None, "", MISSING):
                raise ValueError(
                    f"data.sources.{name}.path={source.path!r}: expected a folder, file, pattern or Hub dataset id."
                )
            if not (_within(source.weight, 0, 10**18) and source.weight > 0):
                raise ValueError(
                    f"data.sources.{name}.weight={source.weight!r}: expected a number > 0. Leave out a data set that"
                    " is not to be used."
                )
        for key in ("split", "name", "image_column", "image_root"):
            if self.sources and getattr(self, key) != getattr(DataConfig, key):
                raise ValueError(
                    f"data.{key}={getattr(self, key)!r} has no effect beside data.sources: set"
                    f" data.sources.{next(iter(self.sources))}.{key} instead."
                )


def _within(value: Any, low: float, high: float, only_whole: bool = False) -> bool:
    """Whether the value is a number from low to high. True and False do not count as numbers."""
    number = isinstance(value, int if only_whole else int | float) and not isinstance(value, bool)
    return number and low <= value <= high
