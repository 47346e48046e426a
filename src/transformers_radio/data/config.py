"""Which images are read, and how they are cropped and shuffled."""

import re
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass
class SourceConfig:
    """One data set of a mixture.

    Attributes:
        path, split, name, image_column, image_root: As in `DataConfig`.
        weight: Share of the images that come from here, relative to the other sets' weights.
    """

    path: str = MISSING
    split: str = "train"
    name: str | None = None
    image_column: str | None = None
    weight: float = 1.0
    image_root: str | None = None


@dataclass
class DataConfig:
    """Which images are read, and how they are cropped and shuffled.

    Attributes:
        path: A folder of images (with any sub-folders), a webdataset tar or a parquet file, a folder of such files, a
            glob pattern or {000..999} range of any of these, a .txt file with one of these per line, the URL of any
            of them, or the id of a dataset on the Hub. `~` is the home folder.
        split: The split of a Hub dataset. In a folder: the sub-folder of this name if there is one; else the tar or
            parquet files whose names start with it; else, for `train`, everything.
        name: The configuration of a Hub dataset that has several.
        image_column: The column of the images; in tars, their extension. Only needed where there are several.
        num_workers: Processes per rank that read and decode. 0: the training process itself does.
        shuffle_window: Samples of a shard that are read ahead and shuffled together; a worker holds this many
            undecoded files in memory for each of its lanes (image folders: only their names).
        crop_scale: Share of the image area that the random crop covers, smallest and largest.
        crop_ratio: Width / height of the crop, smallest and largest.
        horizontal_flip: Mirror half of the crops.
        frozen_crops: The crop of an image is the same in every epoch, and whatever the seed.
        max_skipped_share: The run stops if more than this share of the images of a data set cannot be used.
        min_side: Images with a shorter side (in pixels) are skipped.
        lanes: Number of parallel sequences that the source is dealt out to (see `ImageStream`). Default: the number of
            workers over all ranks. The order of the images depends on it, but not on the numbers of ranks and workers.
        sources: Instead of `path`: several data sets by name, mixed by weight.
        retry_seconds: How long a failing server is tried again before the run stops. 0: not at all.
        max_pixels: Images of more pixels (width x height) are skipped, before they are decoded.
        image_root: The folder that paths in a parquet file start from. Files outside it are not opened. Default: the
            folder of the parquet files.
    """

    path: str | None = None
    split: str = "train"
    name: str | None = None
    image_column: str | None = None
    num_workers: int = 2
    shuffle_window: int = 1000
    # The paper (section 4, "General") applies "random scale + cropping" and gives no ranges: these are ours. Half of
    # the area or more keeps a crop a picture of the same scene, at scales that the teachers know.
    crop_scale: tuple[float, float] = (0.5, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    horizontal_flip: bool = False  # not in the paper; mirrored text would be a wrong target for CLIP
    frozen_crops: bool = False
    max_skipped_share: float = 0.01
    min_side: int = 16
    lanes: int | None = None
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    retry_seconds: float = 300.0
    max_pixels: int = 120_000_000
    image_root: str | None = None

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
