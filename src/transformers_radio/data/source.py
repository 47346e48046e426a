"""Where images come from: a folder, webdataset tars, parquet files or a Hub dataset, all read as one kind of stream.

Everything goes through a streaming `datasets.IterableDataset`. The image column is not decoded by `datasets` but
handed over as bytes, so that a broken file can be skipped and a JPEG decoded at a fraction of its size.
"""

import glob
import hashlib
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from .images import EXTENSIONS

logger = logging.getLogger(__name__)

TAR, PARQUET = (".tar", ".tar.gz", ".tgz"), (".parquet",)
# Files are dealt out to the shards of a folder one by one like cards, so a shard is a fair mix of all sub-folders.
FILES_PER_FOLDER_SHARD = 1000
OTHER_SPLITS = re.compile(r"(train|training|val|valid|validation|dev|test|testing|eval)([^a-zA-Z0-9]|$)")


@dataclass
class DataConfig:
    """Which images are read, and how they are cropped and shuffled.

    Attributes:
        path: A folder of images (nested as it likes), a webdataset tar or a parquet file, a folder of such files, a
            glob pattern of any of these, the URL of a tar or parquet file, or the id of a dataset on the Hugging Face Hub.
        split: Of a Hub dataset, its split. Of a local folder: the sub-folder of this name if there is one; else the
            tar or parquet files whose names start with it; else, for `train`, everything.
        name: The configuration of a Hub dataset that has several.
        image_column: The column, or in tars the extension, of the image. Found by itself when there is only one.
        num_workers: Processes per rank that read and decode. 0: in the training process itself.
        shuffle_window: Samples of a shard that are read ahead and shuffled together; a worker holds this many
            undecoded files in memory for each of its lanes (image folders: only their names).
        crop_scale: Share of the image area that the random crop covers, smallest and largest.
        crop_ratio: Width / height of the crop, smallest and largest.
        horizontal_flip: Mirror half of the crops.
        max_skipped_share: The run stops when more than this share of the images could not be used.
        min_side: Images with a shorter side (in pixels) are skipped.
        lanes: Number of parallel sequences the source is dealt out to (see `ImageStream`). Default: as many as there
            are workers over all ranks. The order of the images depends on it, and on neither ranks nor workers.
    """

    path: str = MISSING
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
    max_skipped_share: float = 0.01
    min_side: int = 16
    lanes: int | None = None

    def validate(self) -> None:
        """Raises ValueError that names the first field out of range."""
        checks = {
            "path": (self.path not in ("", MISSING), "a folder, file, pattern or Hub dataset id"),
            "num_workers": (self.num_workers >= 0, "0 or more"),
            "shuffle_window": (self.shuffle_window >= 1, "1 (no shuffling within a shard) or more"),
            "crop_scale": (0 < self.crop_scale[0] <= self.crop_scale[1] <= 1, "shares 0 < smallest <= largest <= 1"),
            "crop_ratio": (0 < self.crop_ratio[0] <= self.crop_ratio[1], "two numbers 0 < smallest <= largest"),
            "max_skipped_share": (0 <= self.max_skipped_share <= 1, "a share between 0 and 1"),
            "min_side": (self.min_side >= 1, "1 pixel or more"),
            "lanes": (self.lanes is None or self.lanes >= 1, "empty (None) or 1 or more"),
        }
        for field, (valid, expected) in checks.items():
            if not valid:
                raise ValueError(f"data.{field}={getattr(self, field)!r}: expected {expected}.")


class Source:
    """A dataset as numbered shards of numbered records.

    Attributes:
        shards: one name per shard.
        fingerprint: changes when shards (of a folder: files) are added, removed or renamed; moving them is fine.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: it is not clear which files or which column to read; the message says how to choose.
    """

    def __init__(self, config: DataConfig):
        self.path = config.path
        self.key_column: str | None
        kind, folder, files = _find_files(os.path.expanduser(config.path), config.split)
        if kind == "imagefolder":
            names = [os.path.relpath(file, folder) for file in files]
            self.shards = [f"part {i}" for i in range(-(-len(names) // FILES_PER_FOLDER_SHARD))]
            self.dataset, self.image_column, self.key_column = _image_files(folder, names), "image", "key"
        else:
            self.dataset, names = _open_dataset(kind, files, config)
            count = self.dataset.num_shards  # with images in a folder on the Hub, a shard is no file
            self.shards = names if len(names) == count else [f"shard {i}" for i in range(count)]
            self.image_column = _choose_image_column(self.dataset, config)
            self.key_column = "__key__" if "__key__" in self.dataset.features else None
            self.dataset = _without_decoding(self.dataset, self.image_column, self.key_column)
        self.fingerprint = hashlib.sha256("\n".join([self.image_column, *names]).encode()).hexdigest()[:16]
        logger.info("%s: %d shards, images in column %r", config.path, len(self.shards), self.image_column)

    def records(self, shard: int) -> Iterator[tuple[str, Any]]:
        """Yield (key, image) of one shard in its stored order; `read_image` turns the image into bytes.

        The key is the file name relative to the folder, or `shard/key` for tars, or `shard/row` for parquet.
        """
        # `iter` and not `__iter__`: within a DataLoader worker the latter deals out shards by itself a second time.
        batches = self.dataset.shard(len(self.shards), shard, contiguous=False).iter(batch_size=1)
        name = self.shards[shard]
        try:
            for row, batch in enumerate(batches):
                image = batch[self.image_column][0]
                if self.key_column == "key":
                    yield batch["key"][0], image
                else:
                    yield f"{name}/{batch[self.key_column][0] if self.key_column else row}", image
        except Exception as error:
            raise RuntimeError(
                f"Reading {name!r} of {self.path} failed: {type(error).__name__}: {error}. The file may be incomplete:"
                " replace it and resume, or remove it and start anew."
            ) from error


def read_image(value: Any) -> bytes:
    """The bytes of an image as `datasets` hands it over: raw, {"bytes", "path"}, or nothing (b"")."""
    if isinstance(value, dict):
        if value.get("bytes") is not None:
            return value["bytes"]
        value = value.get("path")
    if isinstance(value, str):
        import fsspec

        try:
            with fsspec.open(value, "rb") if "://" in value else open(value, "rb") as file:
                return file.read()
        except FileNotFoundError:
            return b""
    return value or b""


def _find_files(path: str, split: str) -> tuple[str | None, str, list[str]]:
    """-> (builder of `datasets`: "imagefolder", "webdataset", "parquet" or None for the Hub; folder; its files)."""
    if "://" in path:
        kind = _kind_of(path)
        if kind not in ("webdataset", "parquet"):
            raise ValueError(f"data.path={path!r}: a URL must end in one of {', '.join(TAR + PARQUET)}.")
        return kind, os.path.dirname(path), [path]
    if os.path.isdir(path):
        base = os.path.join(path, split) if os.path.isdir(os.path.join(path, split)) else path
        found = [
            os.path.join(folder, name)
            for folder, _, names in os.walk(base, followlinks=True)
            for name in names
            if not name.startswith(".")
        ]
    else:
        base, found = path, [file for file in glob.glob(path, recursive=True) if os.path.isfile(file)]
        if os.path.isfile(path):  # also when its name has brackets
            found = [path]
        elif not found and re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path):
            return None, "", []
    files: dict[str, list[str]] = {}
    for file in sorted(map(os.path.abspath, found)):
        kind = _kind_of(file)
        if kind is not None:
            files.setdefault(kind, []).append(file)
    if not files:
        other = f"{len(found)} other files, but " if found else ""
        raise FileNotFoundError(f"data.path={path!r}: found {other}no images, tar or parquet files there.")
    if len(files) > 1:
        counts = ", ".join(f"{len(paths)} for {kind} such as {paths[0]}" for kind, paths in files.items())
        raise ValueError(
            f"data.path={path!r} holds several kinds of files: {counts}. Give a pattern such as /data/*.tar."
        )
    kind, paths = next(iter(files.items()))
    if not os.path.isdir(path):
        return kind, os.path.commonpath([os.path.dirname(file) for file in paths]), paths
    if base == path:
        paths = _select_split(path, paths, split, by_name=kind != "imagefolder")
    return kind, os.path.abspath(path), paths


def _select_split(path: str, paths: list[str], split: str, by_name: bool) -> list[str]:
    if by_name:
        own = [file for file in paths if re.match(re.escape(split) + r"([^a-zA-Z0-9]|$)", os.path.basename(file))]
        if own:
            return own
        paths = [file for file in paths if not OTHER_SPLITS.match(os.path.basename(file))]
    if split == "train" and paths:
        return paths
    raise ValueError(f"data.path={path!r} has no split {split!r}: neither a sub-folder nor files of this name.")


def _kind_of(name: str) -> str | None:
    lower = name.lower()
    if lower.endswith(TAR):
        return "webdataset"
    if lower.endswith(PARQUET):
        return "parquet"
    return "imagefolder" if lower.endswith(EXTENSIONS) else None


def _image_files(folder: str, names: list[str]):
    """A stream of the files of a folder. Not load_dataset("imagefolder"): that looks at every file first (150 s for a
    million) and reads them in sorted order as one shard, that is class by class."""
    import datasets

    features = datasets.Features({"key": datasets.Value("string"), "image": datasets.Image(decode=False)})
    return datasets.IterableDataset.from_generator(
        _yield_files, features=features, gen_kwargs={"folder": folder, "names": names}
    )


def _yield_files(folder: str, names: list[str]) -> Iterator[dict[str, Any]]:
    for name in names:
        yield {"key": Path(name).as_posix(), "image": {"path": os.path.join(folder, name), "bytes": None}}


def _open_dataset(kind: str | None, files: list[str], config: DataConfig):
    """-> (datasets.IterableDataset, the names of its files)."""
    import datasets

    try:
        if kind is None:
            builder = datasets.load_dataset_builder(config.path, config.name)
        else:
            data_files = {config.split: [glob.escape(file) for file in files]}
            builder = datasets.load_dataset_builder(kind, data_files=data_files)
        dataset = builder.as_streaming_dataset(split=config.split)
    except Exception as error:
        what = f"as the Hub dataset {config.path!r} (no such local path exists)" if kind is None else f"as {kind}"
        raise ValueError(
            f"data.path={config.path!r} could not be opened {what}, split {config.split!r}, name {config.name!r}:"
            f" {error}"
        ) from error
    return dataset, [os.path.basename(file) for file in (builder.config.data_files or {}).get(config.split, [])]


def _choose_image_column(dataset, config: DataConfig) -> str:
    import datasets

    features = dataset.features
    if features is None:
        raise ValueError(f"data.path={config.path!r} does not tell the types of its columns; convert it to parquet.")
    columns = ", ".join(features)
    if config.image_column is not None:
        if config.image_column not in features:
            raise ValueError(f"data.image_column={config.image_column!r}: {config.path} has the columns {columns}.")
        return config.image_column
    found = [
        name
        for name, feature in features.items()
        if isinstance(feature, datasets.Image)
        or (isinstance(feature, dict) and "bytes" in feature)
        or (isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary"))
    ]
    if len(found) > 1:  # a tar with KEY.jpg and KEY.mask.png: the plain name is the image
        usual = ["image", "img", *(extension[1:] for extension in EXTENSIONS)]
        found = [name for name in found if name.lower() in usual] or found
    if len(found) != 1:
        count = f"several ({', '.join(found)})" if found else "none"
        raise ValueError(
            f"data.path={config.path!r}: expected one column of images, found {count} among {columns}."
            " Set data.image_column."
        )
    return found[0]


def _without_decoding(dataset, image_column: str, key_column: str | None):
    import datasets

    if isinstance(dataset.features[image_column], datasets.Image):
        dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
    return dataset.select_columns([image_column, key_column] if key_column else [image_column])
