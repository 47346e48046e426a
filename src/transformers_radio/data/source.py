"""A data set as numbered shards of numbered records: a folder, webdataset tars, parquet files or a Hub dataset.

Only the image of every record is read, and handed over as it is stored, so that a broken file can be skipped and a
JPEG decoded at a fraction of its size.
"""

import errno
import hashlib
import logging
import os
import posixpath
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from PIL import Image

from transformers_radio.modeling.decoding_radio import read_file

from .columns import choose_from_table
from .config import SourceConfig
from .errors import ColumnError, FileError, SourceError, one_line
from .files import local_path
from .images import SkippedImage, decode_rgb
from .listing import Found, disable_retries_of_datasets, explained, find_source, load_builder, patiently, where_of
from .parquet import below, count_rows, find_column, read_parquet, times_read
from .remote import is_url, open_stream, size_of, without_query
from .retry import Retry, is_temporary
from .tars import find_fields, read_tar

logger = logging.getLogger(__name__)

# Files of a folder are dealt out to shards one by one like cards, so that each shard is a fair mix of all sub-folders.
FILES_PER_FOLDER_SHARD = 1000
EVERY_RECORD = range(sys.maxsize)
# Longer text is not taken for a path.
LONGEST_PATH = 4096
# What the system answers, besides ENOENT, where a path does not lead to a file. Files that exist but cannot be read
# end the run: another start might see other images.
NO_FILE = (errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)


class Source:
    """A data set as numbered shards of numbered records.

    Args:
        config: what to read.
        label: the name of the set in a mixture; it starts every key. "" for a single set.
        retry_seconds: how long a server that fails is tried again.

    Attributes:
        shards: one name per shard.
        image_columns: the column of the images; for tars, the extensions that the first samples have.
        fingerprint: changes if shards (in a folder: files) are added, removed or renamed, but not if they are moved.
        where: the field of the recipe that describes the set.
        notes: sentences about files that are there and not read.
        row_ranges: whether parts of a parquet file are ranges of its rows. False: every n-th row, as in positions that
            earlier versions saved.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: it is not clear which files or which column to read, or the server cannot be reached; the message
            says how to choose.
    """

    def __init__(self, config: SourceConfig, label: str = "", retry_seconds: float = 0):
        self.config = config
        self.path = config.path
        self.label = label
        self.where = where_of(label)
        self.retry_seconds = retry_seconds
        found = find_source(config, self.where, retry_seconds)
        self.kind, self.folder, self.files, self.notes = found.kind, found.folder, found.files, found.notes
        self.is_folder = self.kind == "imagefolder"
        self.image_root = self._image_root()
        self.is_remote = found.is_hub or any(map(is_url, self.files))
        self.row_ranges = self.kind == "parquet"
        self._row_counts: dict[int, int] = {}
        if self.is_folder:
            self.image_columns = ["image"]
            self.shards = [f"part {i}" for i in range(-(-len(self.files) // FILES_PER_FOLDER_SHARD))]
            names: Iterable[str] = map(self._name, self.files)
        else:
            self.image_columns = patiently(
                self.path, retry_seconds if self.is_remote else 0, lambda: self._look(found)
            )
            names = [posixpath.basename(file) if found.is_hub else self._name(file) for file in self.files]
            count = len(names) if self.kind is not None else self.dataset.num_shards
            self.shards = names if len(names) == count else [f"shard {i}" for i in range(count)]
        digest = hashlib.sha256("\n".join(self.image_columns).encode())
        for name in names:
            digest.update(b"\n" + name.encode("utf-8", "surrogateescape"))
        self.fingerprint = digest.hexdigest()[:16]
        logger.info("%s: %d shards, images in %s", config.path, len(self.shards), ", ".join(self.image_columns))

    def _image_root(self) -> str:
        given = self.config.image_root
        if given is None or is_url(root := local_path(given)):
            return self.folder if given is None else given
        if not os.path.isdir(root):
            raise ValueError(f"{self.where}.image_root={given!r}: expected a folder that is there.")
        return os.path.abspath(root)

    def _name(self, file: str) -> str:
        return without_query(file)[len(self.folder) :].lstrip("/").replace(os.sep, "/")

    def _look(self, found: Found) -> list[str]:
        """The columns of the images; a dataset on the Hub that is not made of tars or parquet files is opened."""
        how = f"as the Hub dataset {self.path!r} (no such local path exists)" if found.is_hub else f"as {self.kind}"
        with explained(self.config, self.where, how):
            if self.kind == "webdataset":
                return find_fields(self.files, self.config, self.where)
            if self.kind == "parquet":
                return [find_column(self.files, self.config, self.where, found.types)]
            self.dataset, column = _open_stream_of_datasets(self.config, self.where)
            return [column]

    def part(self, shard: int, part: int, parts: int) -> range:
        """The numbers of the records in one of `parts` even parts of a shard; the shard may end before they do.

        In parquet files they are ranges, so that each part of a file is read once; elsewhere every n-th record, as the
        number of records is not known beforehand.
        """
        if parts == 1 or not self.row_ranges:
            return EVERY_RECORD[part::parts]
        rows = self.row_count(shard)
        return range(part * rows // parts, (part + 1) * rows // parts)

    def records(self, shard: int, indices: range = EVERY_RECORD) -> Iterator[tuple[str, Any]]:
        """Yields (key, image) of one shard in its stored order; `read` turns the image into bytes.

        The key is the file name relative to the folder, or `shard/key` for tars, or `shard/row` for parquet.

        Args:
            indices: the numbers of the wanted records, as from `part`.
        """
        name, retry, done = self.shards[shard], self._retry(shard), 0
        prefix = (f"{self.label}/" if self.label else "") + ("" if self.is_folder else f"{name}/")
        while True:
            try:
                for key, image in self._read(shard, indices[done:]):
                    retry.succeeded()
                    yield prefix + key, image
                    done += 1
                return
            except Exception as error:
                if not retry.wait(error):
                    raise _error(f"{name!r} of {self.path}", error, retry, self.is_remote) from error

    def _retry(self, shard: int) -> Retry:
        # a second attempt at a local file would read no more than the first
        seconds = self.retry_seconds if self.is_remote else 0
        return Retry(f"Reading {self.shards[shard]!r} of {self.path}", seconds)

    def row_count(self, shard: int) -> int:
        """The rows of a parquet file, from its footer."""
        if shard in self._row_counts:
            return self._row_counts[shard]
        retry = self._retry(shard)
        while True:
            try:
                self._row_counts[shard] = count_rows(self.files[shard])
                return self._row_counts[shard]
            except Exception as error:
                if not retry.wait(error):
                    raise _error(f"{self.shards[shard]!r} of {self.path}", error, retry, self.is_remote) from error

    def _read(self, shard: int, indices: range) -> Iterator[tuple[str, Any]]:
        config, columns = self.config, self.image_columns
        if self.kind == "imagefolder":
            files = self.files[shard :: len(self.shards)]
            return (
                (self._name(file), {"path": file, "bytes": None})
                for file in files[indices.start : indices.stop : indices.step]
            )
        if self.kind == "webdataset":
            return read_tar(self.files[shard], columns, config.image_column is not None, indices)
        if self.kind == "parquet":
            return read_parquet(self.files[shard], columns[0], config, self.where, indices, self.image_root)
        return self._read_stream_of_datasets(shard, indices)

    def _read_stream_of_datasets(self, shard: int, indices: range) -> Iterator[tuple[str, Any]]:
        disable_retries_of_datasets()
        dataset = self.dataset.shard(len(self.shards), shard, contiguous=False)
        # `iter` and not `__iter__`: within a DataLoader worker the latter deals out shards a second time.
        for row, batch in enumerate(dataset.iter(batch_size=1)):
            if row in indices:
                key = batch["__key__"][0] if "__key__" in batch else str(row)
                yield key, below(self.image_root, batch[self.image_columns[0]][0])

    def traffic_note(self, parts: int, lanes: int) -> str | None:
        """A note about how often an epoch reads each file from a server, if that is clearly more than once."""
        if parts == 1 or not self.is_remote or self.is_folder:
            return None
        seconds = self.retry_seconds
        times = patiently(self.path, seconds, lambda: times_read(self.files[0], parts)) if self.row_ranges else parts
        if times < 1.5:
            return None
        size = patiently(self.path, seconds, lambda: size_of(self.files[0])) if is_url(self.files[0]) else None
        total = f", which is {times * size * len(self.files) / 1e9:,.0f} GB from the server" if size else ""
        groups = ", or with files of more row groups," if self.row_ranges else ""
        return (
            f"an epoch reads every file {times:.1f} times{total}, as {len(self.shards)} files are dealt out to {lanes}"
            f" lanes. With data.lanes={max(1, len(self.shards) // 8)} or less{groups} each is read once"
        )

    def read(self, image: Any) -> bytes:
        """`read_image` of what `records` yields; repeated while a server fails."""
        path = image.get("path") if isinstance(image, dict) and image.get("bytes") is None else image
        if not isinstance(path, str) or not is_url(path):
            return read_image(image)
        what = f"{path[:LONGEST_PATH]} of {self.path}"
        retry = Retry(f"Reading {what}", self.retry_seconds)
        while True:
            try:
                return read_image(image)
            except Exception as error:
                if not retry.wait(error):
                    raise _error(what, error, retry, is_remote=True) from error


def _error(what: str, error: Exception, retry: Retry, is_remote: bool) -> SourceError:
    if is_remote and is_temporary(error):
        advice = f" The server still fails ({retry}): resume when it is back, or raise data.retry_seconds."
    elif isinstance(error, ColumnError | FileError):  # says it all
        return SourceError(f"Reading {what} failed: {one_line(error)}")
    else:
        advice = " The file may be incomplete: replace it and resume, or remove it and start anew."
    return SourceError(f"Reading {what} failed: {type(error).__name__}: {one_line(error).rstrip('.')}.{advice}")


def read_image(value: Any) -> bytes:
    """The bytes of an image as a table has it: raw bytes, {"bytes", "path"}, a path or a URL; b"" where there is none.

    A path that does not lead to a file (but to nothing, a folder, a pipe or a device) has no bytes either.

    Raises:
        OSError: the file may not be read, or the disk or the server fails.
    """
    if isinstance(value, dict):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, SkippedImage):
        raise value
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not value:
        return b""
    if not isinstance(value, str):
        return value
    if len(value) > LONGEST_PATH or "\0" in value:  # some other text
        return b""
    try:
        if not is_url(value):
            return read_file(value)
        with open_stream(value) as file:
            return file.read()
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not is_temporary(error):
            return b""
        if not is_url(value) and error.errno in NO_FILE:
            return b""
        raise


def read_rgb(value: Any) -> Image.Image:
    """The upright RGB image of what `read_image` takes: bytes, a table's {"bytes", "path"}, a path or a URL.

    Raises:
        SkippedImage: there is none, or it cannot be decoded; see `decode_rgb`.
        OSError: the file may not be read, or the disk or the server fails.
    """
    return decode_rgb(read_image(value))


def _open_stream_of_datasets(config: SourceConfig, where: str) -> tuple[Any, str]:
    """(A datasets.IterableDataset of the images of a dataset on the Hub, the name of their column.)"""
    import datasets

    dataset = load_builder(config).as_streaming_dataset(split=config.split)
    if dataset.features is None:
        raise ColumnError(
            f"{where}.path={config.path!r} does not tell the types of its columns; convert it to parquet."
        )

    def first_values(columns: list[str]) -> dict[str, Any]:
        first: dict[str, Any] = next(iter(dataset.select_columns(columns)), {}) if columns else {}
        return {name: value for name, value in first.items() if value is not None}

    types = {name: type(feature).__name__ for name, feature in dataset.features.items()}
    declared = {name: kind for name, kind in types.items() if kind != "dict"}
    column = choose_from_table(dataset.features.arrow_schema, declared, first_values, config, where)
    if isinstance(dataset.features[column], datasets.Image):
        dataset = dataset.cast_column(column, datasets.Image(decode=False))
    return dataset.select_columns([column, *({"__key__"} & set(dataset.features))]), column
