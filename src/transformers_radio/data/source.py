"""Where images come from: a folder, webdataset tars, parquet files or a Hub dataset, all read as one kind of stream.

Everything goes through a streaming `datasets.IterableDataset`. The image column is not decoded by `datasets` but
handed over as bytes, so that a broken file can be skipped and a JPEG decoded at a fraction of its size.
"""

import contextlib
import glob
import hashlib
import itertools
import logging
import os
import re
import tarfile
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
# Samples of a tar that are looked at to learn which extension is the image's.
SAMPLES_LOOKED_AT = 20
OTHER_SPLITS = re.compile(r"(train|training|val|valid|validation|dev|test|testing|eval)([^a-zA-Z0-9]|$)")


class SourceError(RuntimeError):
    """The source cannot be read on, or too many of its images cannot be used; the message says what and the fix."""


@dataclass
class DataConfig:
    """Which images are read, and how they are cropped and shuffled.

    Attributes:
        path: A folder of images (nested as it likes), a webdataset tar or a parquet file, a folder of such files, a
            glob pattern of any of these, the URL of a tar or parquet file, or the id of a dataset on the Hub.
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
        kind, folder, files = _find_files(os.path.expanduser(config.path), config.split)
        names = [Path(file[len(folder) :].lstrip(os.sep)).as_posix() for file in files]
        self.is_folder = kind == "imagefolder"
        if self.is_folder:
            count = -(-len(names) // FILES_PER_FOLDER_SHARD)
            self.shards = [f"part {i}" for i in range(count)]
            self.dataset = _image_files(folder, [names[i::count] for i in range(count)])
            self.image_columns = ["image"]
        else:
            self.dataset, self.image_columns, hub_names = _open_dataset(kind, files, config)
            names = names or hub_names
            count = self.dataset.num_shards  # with images in a folder on the Hub, a shard is no file
            self.shards = names if len(names) == count else [f"shard {i}" for i in range(count)]
        self.fingerprint = hashlib.sha256("\n".join([*self.image_columns, *names]).encode()).hexdigest()[:16]
        logger.info("%s: %d shards, images in %s", config.path, len(self.shards), ", ".join(self.image_columns))

    def records(self, shard: int) -> Iterator[tuple[str, Any]]:
        """Yield (key, image) of one shard in its stored order; `read_image` turns the image into bytes.

        The key is the file name relative to the folder, or `shard/key` for tars, or `shard/row` for parquet.
        """
        # `iter` and not `__iter__`: within a DataLoader worker the latter deals out shards by itself a second time.
        batches = self.dataset.shard(len(self.shards), shard, contiguous=False).iter(batch_size=1)
        name = self.shards[shard]
        try:
            for row, batch in enumerate(batches):
                image = next((batch[column][0] for column in self.image_columns if batch[column][0]), None)
                key = batch["__key__"][0] if "__key__" in batch else str(row)
                yield key if self.is_folder else f"{name}/{key}", image
        except Exception as error:
            raise SourceError(
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
    if not os.path.exists(path) and not glob.has_magic(path):
        if re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path):
            return None, "", []
        raise FileNotFoundError(f"data.path={path!r} does not exist.")

    folder = os.path.abspath(path)
    in_split = os.path.isdir(os.path.join(folder, split))
    if os.path.isdir(folder):
        walk = os.walk(os.path.join(folder, split) if in_split else folder, followlinks=True)
        found = [os.path.join(parent, name) for parent, _, names in walk for name in names if not name.startswith(".")]
    elif os.path.isfile(folder):
        found = [folder]
    else:
        found = [file for file in glob.glob(folder, recursive=True) if os.path.isfile(file)]
    files: dict[str, list[str]] = {}
    for file in sorted(found):
        kind = _kind_of(file)
        if kind is not None:
            files.setdefault(kind, []).append(file)
    if not files:
        other = f" among {len(found)} files" if found else ""
        raise FileNotFoundError(f"data.path={path!r}: found no images, tar or parquet files{other} there.")
    if len(files) > 1:
        counts = ", ".join(f"{len(paths)} for {kind} such as {paths[0]}" for kind, paths in files.items())
        raise ValueError(
            f"data.path={path!r} holds several kinds of files: {counts}. Give a pattern such as /data/*.tar."
        )
    kind, paths = next(iter(files.items()))
    if not os.path.isdir(folder):
        folder = os.path.commonpath([os.path.dirname(file) for file in paths])
    elif not in_split:
        paths = _select_split(path, paths, split, by_name=kind != "imagefolder")
    return kind, folder, paths


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


def _image_files(folder: str, parts: list[list[str]]):
    """A stream of the files of a folder. Not load_dataset("imagefolder"): that looks at every file first (150 s for a
    million) and reads them in sorted order as one shard, that is class by class."""
    import datasets

    features = datasets.Features({"__key__": datasets.Value("string"), "image": datasets.Image(decode=False)})
    return datasets.IterableDataset.from_generator(
        _yield_files, features=features, gen_kwargs={"folder": folder, "parts": parts}
    )


def _yield_files(folder: str, parts: list[list[str]]) -> Iterator[dict[str, Any]]:
    for name in itertools.chain.from_iterable(parts):
        yield {"__key__": name, "image": {"path": os.path.join(folder, name), "bytes": None}}


def _open_dataset(kind: str | None, files: list[str], config: DataConfig):
    """-> (datasets.IterableDataset, the columns of its images, the names of its files)."""
    import datasets

    with _explained(kind, config):
        if kind is None:
            builder = datasets.load_dataset_builder(config.path, config.name)
        else:
            data_files = {config.split: [file if "://" in file else glob.escape(file) for file in files]}
            builder = datasets.load_dataset_builder(kind, data_files=data_files)
        names = [str(file) for file in (builder.config.data_files or {}).get(config.split, [])]
        samples = _read_field_names(names[0]) if names and names[0].lower().endswith(TAR) else None
    if samples is not None:
        # Left to find the columns by itself, `datasets` gives up on tars with several image formats, or with JSON
        # whose types vary.
        images = [name for sample in samples for name in sample if f".{name}".lower().endswith(EXTENSIONS)]
        columns = _choose_image_columns(samples, list(dict.fromkeys(images)), config)
        features = {
            "__key__": datasets.Value("string"),
            **{column: datasets.Image(decode=False) for column in columns},
        }
        builder.info.features = datasets.Features(features)
    with _explained(kind, config):
        dataset = builder.as_streaming_dataset(split=config.split)
    if samples is None:
        features = dataset.features
        if features is None:
            raise ValueError(
                f"data.path={config.path!r} does not tell the types of its columns; convert it to parquet."
            )
        images = [
            name
            for name, feature in features.items()
            if isinstance(feature, datasets.Image)
            or (isinstance(feature, dict) and "bytes" in feature)
            or (isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary"))
        ]
        columns = _choose_image_columns([list(features)], images, config)
        if isinstance(features[columns[0]], datasets.Image):
            dataset = dataset.cast_column(columns[0], datasets.Image(decode=False))
    keys = [column for column in dataset.features if column == "__key__"]
    return dataset.select_columns(columns + keys), columns, [os.path.basename(name) for name in names]


@contextlib.contextmanager
def _explained(kind: str | None, config: DataConfig) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        what = f"as the Hub dataset {config.path!r} (no such local path exists)" if kind is None else f"as {kind}"
        raise ValueError(
            f"data.path={config.path!r} could not be opened {what}, split {config.split!r}, name {config.name!r}:"
            f" {error}"
        ) from error


def _read_field_names(tar_path: str) -> list[list[str]]:
    """The extensions that belong to each of the first samples of a tar."""
    import fsspec

    samples: dict[str, list[str]] = {}
    try:
        with fsspec.open(tar_path, "rb") as file, tarfile.open(fileobj=file, mode="r|*") as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                key, _, extension = name.partition(".")
                if member.isfile() and key and extension:
                    samples.setdefault(f"{folder}/{key}", []).append(extension)
                if len(samples) > SAMPLES_LOOKED_AT:
                    break
    except tarfile.TarError as error:
        raise ValueError(f"{tar_path}: {error}") from error
    return list(samples.values())


def _choose_image_columns(samples: list[list[str]], images: list[str], config: DataConfig) -> list[str]:
    """Choose among the columns `images`. Several can only be meant when no sample has two of them (jpg or png)."""
    all_columns = ", ".join(dict.fromkeys(itertools.chain.from_iterable(samples)))
    if config.image_column is not None:
        if config.image_column not in all_columns.split(", "):
            raise ValueError(
                f"data.image_column={config.image_column!r}: {config.path} has the columns {all_columns}."
            )
        return [config.image_column]
    if len(images) > 1:  # a tar with KEY.jpg and KEY.mask.png: the plain name is the image
        usual = ["image", "img", *(extension[1:] for extension in EXTENSIONS)]
        images = [name for name in images if name.lower() in usual] or images
    if not images or max(len(set(images) & set(sample)) for sample in samples) > 1:
        found = f"several ({', '.join(images)})" if images else "none"
        raise ValueError(
            f"data.path={config.path!r}: expected one column of images, found {found} among {all_columns}."
            " Set data.image_column."
        )
    return images
