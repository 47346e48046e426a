"""The files of a split of a data set, found as training finds its own, and their identity."""

import contextlib
import glob
import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers_radio.data.errors import FileError, one_line
from transformers_radio.data.files import find_files, kind_of
from transformers_radio.disk import digest, fingerprint_files
from transformers_radio.evaluation.models.specs import folder_or_hub
from transformers_radio.evaluation.paths import expand_home

logger = logging.getLogger(__name__)

# Names of the usual splits, as `datasets` knows them. Those of a row mean the same.
SPLITS = (
    ("train", "training"),
    ("validation", "val", "valid", "dev"),
    ("test", "testing", "eval", "evaluation"),
)
# Tables beside class folders with labels and other columns of the images; only `datasets` reads them.
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


@dataclass
class SplitFiles:
    """The files of a split."""

    source: str
    split: str
    kind: str | None  # the builder of `datasets` that reads the files; None where `datasets` finds that out too
    folder: str  # that the files are named from
    files: list[str]  # in the order of their names
    revisions: Any = None  # of files on servers, as `datasets` has them

    def load_arguments(self, config_name: str | None) -> dict[str, Any]:
        """Arguments of `datasets.load_dataset` and `load_dataset_builder`."""
        if self.kind is None:
            return {"path": self.source, "name": config_name}
        files = [file if "://" in file else glob.escape(file) for file in self.files]
        return {"path": self.kind, "data_files": {self.split: files}}

    def take_files(self, data_files: Any) -> None:
        """Takes the files that `datasets` has found, if finding them was left to it or they are on servers."""
        if self.kind is None or self.is_remote:
            self.files, self.folder = [str(file) for file in data_files], os.path.realpath(self.folder)
            self.revisions = getattr(data_files, "origin_metadata", None)

    @property
    def is_remote(self) -> bool:
        return any("://" in file for file in self.files)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of names below the folder, sizes and dates; for files on servers, of places and revisions."""
        if self.is_remote or not self.files:
            return _digest(self.files, self.revisions)
        return fingerprint_files(self.files, self.folder)

    def fingerprint_before(self, folder: str) -> str:
        """The fingerprint that earlier versions gave these files when they lay in `folder`."""
        if self.is_remote or not self.files:
            return self.fingerprint
        files = [os.path.join(os.path.realpath(folder), os.path.relpath(file, self.folder)) for file in self.files]
        return _digest(files, [(str(os.stat(file).st_mtime),) for file in self.files])


def _digest(files: list[str], revisions: Any) -> str:
    return digest([*(f"{file}\n" for file in files), repr(revisions)])


def split_names(split: str) -> tuple[str, ...]:
    """The names that a split may have, beginning with the one that is asked for."""
    others = next((row for row in SPLITS if split in row), ())
    return (split, *(name for name in others if name != split))


def own_split_name(source: str, split: str) -> str:
    """Which of its names the split has there; `split` itself where none is."""
    folder = expand_home(source)
    names = split_names(split)
    there = os.listdir(folder) if os.path.isdir(folder) else []
    named = (name for name in names if any(re.match(re.escape(name) + r"([^a-zA-Z0-9]|$)", one) for one in there))
    return next(named, split)


def find_split(source: str | Path, split: str, config_name: str | None = None) -> SplitFiles:
    """The files of a split: `data.files.find_files` for each of its names, then `datasets`' rule for nested ones.

    Where there is no such path, or the folder is laid out as only `datasets` reads it (with configurations in its
    README.md, as CSV, ...), the result has no files: `datasets` finds them.

    Raises:
        FileNotFoundError: a path that cannot be a name on the Hub, or a folder without data.
        ValueError: no such split, or several kinds of files.
    """
    path = expand_home(str(source))
    if "://" not in path and os.path.exists(path):
        path = os.path.abspath(path)
    elif "://" not in path and not glob.has_magic(path):
        return SplitFiles(path, split, None, "", [])
    if not glob.has_magic(path) and (config_name is not None or _has_card(path)):
        return SplitFiles(path, split, None, path, [])
    try:
        kind, folder, files = _find(path, split)
    except (ValueError, FileNotFoundError) as error:
        if os.path.isdir(path) and not glob.has_magic(path) and _is_for_datasets(path):
            return SplitFiles(path, split, None, path, [])
        raise type(error)(in_words_of_evaluation(str(error))) from error
    if kind == "imagefolder":
        roots = {folder, *(os.path.join(folder, name) for name in split_names(split))}
        tables = [os.path.join(root, name) for root in roots for name in METADATA]
        files = sorted([*files, *filter(os.path.isfile, tables)])
    return SplitFiles(path, split, kind, folder, files)


def _find(path: str, split: str) -> tuple[str, str, list[str]]:
    """(kind, folder, files) as `find_files` has them."""
    names, refused = split_names(split), None
    for name in [name for name in names if os.path.isdir(os.path.join(path, name))] or names:
        try:
            kind, folder, files, notes = find_files(path, name, "data")
        except ValueError as error:
            if os.path.isdir(os.path.join(path, name)):
                raise
            refused = error if name == split else refused
            continue
        assert kind is not None  # only where there is no such path
        is_named = all(re.match(re.escape(name) + r"([^a-zA-Z0-9]|$)", os.path.basename(file)) for file in files)
        if name != "train" or is_named or os.path.isdir(os.path.join(folder, name)):
            for note in notes:
                logger.warning("%s: %s", path, in_words_of_evaluation(note))
            return kind, folder, files
    try:  # all files that do not belong to another split by the beginning of their names
        kind, folder, files, _ = find_files(path, "train", "data")
    except ValueError as error:
        raise refused or error from error
    assert kind is not None
    named = {file: _above_class(file, kind, folder) for file in files}
    own = [file for file in files if _mentions(named[file], names)]
    others = [name for row in SPLITS if split not in row for name in row]
    if not own and "train" in names and not any(_mentions(name, others) for name in named.values()):
        own = files
    if not own:
        raise refused or ValueError(f"data.path={path!r} has no split {split!r}, but others: set data.split.")
    return kind, folder, own


def _above_class(file: str, kind: str, folder: str) -> str:
    """The part of a file's path that may name its split; a class may have any name, so its folder does not count."""
    parts = Path(os.path.relpath(file, folder)).parts
    return os.path.join("", *(parts[:-2] if kind == "imagefolder" else parts))


def _mentions(path: str, names: Sequence[str] | set[str]) -> bool:
    """Whether one of the words is in a path, set off by other characters than letters: `datasets`' rule."""
    return re.search(rf"(^|[-._ 0-9/])({'|'.join(map(re.escape, names))})([-._ 0-9/]|$)", path) is not None


def in_words_of_evaluation(message: str) -> str:
    """A message about a field of a training recipe, such as `data.path`, with the name that evaluation has for it."""
    return re.sub(r"\bdata\.path\b", "data", re.sub(r"\bdata\.(split|image_column)\b", r"\1", message))


def _has_card(path: str) -> bool:
    """Whether the folder has a README.md with settings for `datasets`: configurations, numbers of images."""
    card = os.path.join(path, "README.md")
    if not os.path.isfile(card):
        return False
    with open(card, encoding="utf-8", errors="replace") as file:
        return file.readline().strip() == "---"


def _is_for_datasets(path: str) -> bool:
    """Whether there is a file that training does not read, and `datasets` may."""
    return any(
        kind_of(name) is None or name in METADATA
        for _, _, names in os.walk(path)
        for name in names
        if not name.startswith(".")
    )


@contextlib.contextmanager
def naming(found: SplitFiles) -> Iterator[None]:
    """Turns an error about a damaged file into one line with the name of the split, or of its only file.

    Raises:
        FileError: in place of an error of pyarrow, or an OSError that does not name the file.
    """
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, FileNotFoundError) or getattr(error, "filename", None) is not None:
            raise
        what = found.files[0] if len(found.files) == 1 else f"a file of {found.source} ({found.split})"
        raise FileError(f"{what} cannot be read: {one_line(error)} Replace it, or remove it.") from error


def load_builder(found: SplitFiles, config_name: str | None) -> Any:
    """The `datasets.DatasetBuilder` of a split that is not made of class folders.

    Raises:
        FileNotFoundError: neither a folder nor a data set on the Hub has this name.
    """
    import datasets

    with folder_or_hub(found.source):
        return datasets.load_dataset_builder(**found.load_arguments(config_name))


def class_names(found: SplitFiles) -> list[str] | None:
    """The names of the class folders of all splits together, sorted, so that a label means the same in each.

    None if the images do not lie in two or more folders at one depth, or a table of metadata is there.
    """
    if found.kind != "imagefolder" or any(os.path.basename(file) in METADATA for file in found.files):
        return None
    folders = {os.path.dirname(file) for file in found.files}
    depths = {folder.count(os.sep) for folder in folders}
    for name in {name for row in SPLITS for name in row} - set(split_names(found.split)):
        if os.path.isdir(os.path.join(found.source, name)):
            with contextlib.suppress(ValueError, FileNotFoundError):
                files = find_files(found.source, name, "data")[2]
                folders |= {folder for file in files if (folder := os.path.dirname(file)).count(os.sep) in depths}
    folders -= {os.path.join(found.folder, name) for row in SPLITS for name in row}  # images without a class
    names = sorted({os.path.basename(folder) for folder in folders})
    return names if len(names) > 1 and len(depths) == 1 else None
