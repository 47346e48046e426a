"""A data set as numbered shards of numbered records: a folder, webdataset tars, parquet files or a Hub dataset.

Everything goes through a streaming `datasets.IterableDataset`. The image column is not decoded by `datasets` but
handed over as bytes, so that a broken file can be skipped and a JPEG decoded at a fraction of its size.
"""

import contextlib
import glob
import hashlib
import itertools
import logging
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .config import SourceConfig
from .errors import SourceError
from .files import TAR, find_files
from .images import EXTENSIONS
from .retry import Retry, is_temporary

logger = logging.getLogger(__name__)

# Files are dealt out to the shards of a folder one by one like cards, so a shard is a fair mix of all sub-folders.
FILES_PER_FOLDER_SHARD = 1000
# Samples of a tar that are looked at to learn which extension is the image's.
SAMPLES_LOOKED_AT = 20
# The ids of datasets that this process has opened before. Every stage of a run opens its data anew.
_opened_on_hub: set[str] = set()


class Source:
    """A data set as numbered shards of numbered records.

    Args:
        config: what to read.
        label: the name of the set in a mixture; it starts every key. "" for a single set.
        retry_seconds: how long a server that fails is tried again.

    Attributes:
        shards: one name per shard.
        fingerprint: changes when shards (of a folder: files) are added, removed or renamed; moving them is fine.
        where: the field of the recipe that describes the set.
        notes: sentences about files that are there and not read.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: it is not clear which files or which column to read, or the server cannot be reached; the message
            says how to choose.
    """

    def __init__(self, config: SourceConfig, label: str = "", retry_seconds: float = 0):
        self.path = config.path
        self.label = label
        self.where = f"data.sources.{label}" if label else "data"
        kind, folder, files, self.notes = find_files(os.path.expanduser(config.path), config.split, self.where)
        names = [Path(file[len(folder) :].lstrip(os.sep)).as_posix() for file in files]
        self.is_folder = kind == "imagefolder"
        self.is_remote = kind is None or ("://" in config.path and not config.path.startswith(("file:", "local:")))
        self.retry_seconds = retry_seconds
        if self.is_folder:
            count = -(-len(names) // FILES_PER_FOLDER_SHARD)
            self.shards = [f"part {i}" for i in range(count)]
            self.dataset = _image_files(folder, [names[i::count] for i in range(count)])
            self.image_columns = ["image"]
        else:
            self.dataset, self.image_columns, hub_names = self._open(kind, files, config)
            names = names or hub_names
            count = self.dataset.num_shards  # with images in a folder on the Hub, a shard is no file
            self.shards = names if len(names) == count else [f"shard {i}" for i in range(count)]
        self.fingerprint = hashlib.sha256("\n".join([*self.image_columns, *names]).encode()).hexdigest()[:16]
        logger.info("%s: %d shards, images in %s", config.path, len(self.shards), ", ".join(self.image_columns))

    def _open(self, kind: str | None, files: list[str], config: SourceConfig):
        """`_open_dataset`, tried again while a server fails."""
        # What the Hub has never answered for is rather a mistyped local path than a failure of the Hub.
        may_be_local = kind is None and self.path not in _opened_on_hub
        retry = Retry(f"Opening {self.path}", self.retry_seconds if self.is_remote and not may_be_local else 0)
        while True:
            try:
                opened = _open_dataset(kind, files, config, self.where)
                if kind is None:
                    _opened_on_hub.add(self.path)
                return opened
            except ValueError as error:
                if retry.wait(error):
                    continue
                if retry.failures:
                    raise ValueError(f"{error} ({retry})") from error
                raise

    def records(self, shard: int) -> Iterator[tuple[str, Any]]:
        """Yield (key, image) of one shard in its stored order; `read_image` turns the image into bytes.

        The key is the file name relative to the folder, or `shard/key` for tars, or `shard/row` for parquet.
        """
        dataset = self.dataset.shard(len(self.shards), shard, contiguous=False)
        name = self.shards[shard]
        prefix = (f"{self.label}/" if self.label else "") + ("" if self.is_folder else f"{name}/")
        # Of a local file a second attempt reads no more than the first.
        retry = Retry(f"Reading {name!r} of {self.path}", self.retry_seconds if self.is_remote else 0)
        done = 0
        while True:
            try:
                if self.is_remote:
                    _disable_retries_of_datasets()
                # `iter` and not `__iter__`: within a DataLoader worker the latter deals out shards a second time.
                for row, batch in enumerate(dataset.iter(batch_size=1)):
                    if row < done:  # read before the connection failed
                        continue
                    retry.succeeded()
                    image = next((batch[column][0] for column in self.image_columns if batch[column][0]), None)
                    key = batch["__key__"][0] if "__key__" in batch else str(row)
                    yield prefix + key, image
                    done += 1
                return
            except Exception as error:
                if not retry.wait(error):
                    raise _error(f"{name!r} of {self.path}", error, retry, self.is_remote) from error

    def read(self, image: Any) -> bytes:
        """`read_image` of what `records` yields, tried again while a server fails."""
        path = image.get("path") if isinstance(image, dict) else image
        is_remote = isinstance(path, str) and "://" in path
        retry = Retry(f"Reading {path} of {self.path}", self.retry_seconds if is_remote else 0)
        while True:
            try:
                return read_image(image)
            except Exception as error:
                if retry.wait(error):
                    continue
                if not is_remote:
                    raise
                raise _error(f"{path} of {self.path}", error, retry, is_remote) from error


def _error(what: str, error: Exception, retry: Retry, is_remote: bool) -> SourceError:
    if is_remote and is_temporary(error):
        advice = f"The server still fails ({retry}): resume when it is back, or raise data.retry_seconds."
    else:
        advice = "The file may be incomplete: replace it and resume, or remove it and start anew."
    return SourceError(f"Reading {what} failed: {type(error).__name__}: {error}. {advice}")


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
        except FileNotFoundError as error:
            if is_temporary(error):
                raise
            return b""
    return value or b""


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


def _open_dataset(kind: str | None, files: list[str], config: SourceConfig, where: str):
    """-> (datasets.IterableDataset, the columns of its images, the names of its files)."""
    import datasets
    import fsspec

    with _explained(kind, config, where):
        if kind is None or "://" in files[0]:
            _disable_retries_of_datasets()
        if kind is None:
            builder = datasets.load_dataset_builder(config.path, config.name)
        else:
            if "://" in files[0]:  # `datasets` would call it missing, whatever the server answers
                file_system, path = fsspec.core.url_to_fs(files[0])
                file_system.info(path)
            data_files = {config.split: [file if "://" in file else glob.escape(file) for file in files]}
            builder = datasets.load_dataset_builder(kind, data_files=data_files)
        names = [str(file) for file in (builder.config.data_files or {}).get(config.split, [])]
        samples = _read_field_names(names[0]) if names and names[0].lower().endswith(TAR) else None
    if samples is not None:
        # Left to find the columns by itself, `datasets` gives up on tars with several image formats, or with JSON
        # whose types vary.
        images = [name for sample in samples for name in sample if f".{name}".lower().endswith(EXTENSIONS)]
        columns = _choose_image_columns(samples, list(dict.fromkeys(images)), config, where)
        features = {
            "__key__": datasets.Value("string"),
            **{column: datasets.Image(decode=False) for column in columns},
        }
        builder.info.features = datasets.Features(features)
    with _explained(kind, config, where):
        dataset = builder.as_streaming_dataset(split=config.split)
    if samples is None:
        features = dataset.features
        if features is None:
            raise ValueError(
                f"{where}.path={config.path!r} does not tell the types of its columns; convert it to parquet."
            )
        images = [
            name
            for name, feature in features.items()
            if isinstance(feature, datasets.Image)
            or (isinstance(feature, dict) and "bytes" in feature)
            or (isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary"))
        ]
        columns = _choose_image_columns([list(features)], images, config, where)
        if isinstance(features[columns[0]], datasets.Image):
            dataset = dataset.cast_column(columns[0], datasets.Image(decode=False))
    keys = [column for column in dataset.features if column == "__key__"]
    return dataset.select_columns(columns + keys), columns, [os.path.basename(name) for name in names]


@contextlib.contextmanager
def _explained(kind: str | None, config: SourceConfig, where: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        what = f"as the Hub dataset {config.path!r} (no such local path exists)" if kind is None else f"as {kind}"
        raise ValueError(
            f"{where}.path={config.path!r} could not be opened {what}, split {config.split!r}, name {config.name!r}:"
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


def _choose_image_columns(samples: list[list[str]], images: list[str], config: SourceConfig, where: str) -> list[str]:
    """Choose among the columns `images`. Several can only be meant when no sample has two of them (jpg or png)."""
    all_columns = ", ".join(dict.fromkeys(itertools.chain.from_iterable(samples)))
    if config.image_column is not None:
        if config.image_column not in all_columns.split(", "):
            raise ValueError(
                f"{where}.image_column={config.image_column!r}: {config.path} has the columns {all_columns}."
            )
        return [config.image_column]
    if len(images) > 1:  # a tar with KEY.jpg and KEY.mask.png: the plain name is the image
        usual = ["image", "img", *(extension[1:] for extension in EXTENSIONS)]
        images = [name for name in images if name.lower() in usual] or images
    # of x.001.jpg and y.002.jpg neither column is that of all samples, even if no sample has two of them
    stems = {name.rpartition(".")[0] for name in images}
    if len(stems) != 1 or max(len(set(images) & set(sample)) for sample in samples) > 1:
        found = f"several ({', '.join(images)})" if images else "none"
        fix = f"Set {where}.image_column."
        if stems - {""}:
            fix += (
                " A sample's key ends at the first dot of its file name and the rest names the column: if names in the"
                " tar have dots of their own, such as my.photo.001.jpg, rename these files and write the tar again."
            )
        raise ValueError(
            f"{where}.path={config.path!r}: expected one column of images, found {found} among {all_columns}. {fix}"
        )
    return images


def _disable_retries_of_datasets() -> None:
    """`datasets` reads on from the connection that has failed, where some file systems then find the end of the file:
    the rest of a tar would be lost without a word. Here the file is opened again."""
    import datasets

    for action in ("OPEN", "READ"):
        setattr(datasets.config, f"STREAMING_{action}_MAX_RETRIES", 1)
    for pause in ("OPEN_RETRY", "READ_RETRY", "READ_SERVER_UNAVAILABLE_RETRY", "READ_RATE_LIMIT_RETRY"):
        setattr(datasets.config, f"STREAMING_{pause}_INTERVAL", 0)
