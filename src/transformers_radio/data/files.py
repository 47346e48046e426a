"""Which files `data.path` stands for, on a disk or a server, and notes about those that are not read."""

import glob
import itertools
import math
import os
import re
from collections import Counter
from typing import NamedTuple

from .images import EXTENSIONS
from .remote import has_wildcard, is_url, list_folder, match, open_stream, without_query
from .walk import count, file_names, listed_names, match_local, walk

TAR, PARQUET = (".tar", ".tar.gz", ".tgz"), (".parquet",)
OTHER_SPLITS = re.compile(r"(train|training|val|valid|validation|dev|test|testing|eval)([^a-zA-Z0-9]|$)")
# {00000..00999} and {a,b}, as shells and webdataset write them.
BRACES = re.compile(r"\{(\d+\.\.\d+|[^{},]*(?:,[^{},]*)+)\}")
MAX_EXPANDED = 10_000_000


def kind_of(name: str) -> str | None:
    """The builder of `datasets` for a file of this name: imagefolder, webdataset or parquet; None if there is none."""
    lower = without_query(name).lower()
    if lower.endswith(TAR):
        return "webdataset"
    if lower.endswith(PARQUET):
        return "parquet"
    return "imagefolder" if lower.endswith(EXTENSIONS) else None


def find_files(path: str, split: str, where: str) -> tuple[str | None, str, list[str], list[str]]:
    """Finds what `path` stands for.

    Args:
        path: as `DataConfig.path`.
        split: as `DataConfig.split`.
        where: the field of the recipe that holds path and split, for messages.

    Returns:
        (kind of the files, None for a dataset on the Hub; the folder that they are named from; the files, sorted;
        notes: sentences about what is left out).

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: it is not clear which files to read.
        OSError: a server does not answer; see `retry.is_temporary`.
    """
    what, path = f"{where}.path={path!r}", local_path(path)
    listed = _list(path, split, what)
    if listed is None:
        return None, "", [], []
    root, in_split, found, notes = listed
    beside: list[str] = []
    if in_split and is_url(path):
        beside = [file for file in found if not file.startswith(f"{root}{split}/")]
        found = [file for file in found if file.startswith(f"{root}{split}/")]
    kind, paths, unread = _one_kind(sorted(set(found)), is_folder=root is not None, what=what)
    notes += unread
    if root is None:
        return kind, _common_folder(paths), paths, notes
    if in_split:
        notes += _beside_url(beside, root, split) if is_url(path) else _beside(root, split, where)
        return kind, root, paths, notes
    paths, others = _select_split(path, paths, split, where, by_name=kind != "imagefolder")
    if kind == "imagefolder" and not is_url(path):
        notes += _splits_read_too(root, paths, split, where)
    if others:
        notes.append(
            f"left out {count(len(others), 'file')} whose names do not start with {split!r}:"
            f" {listed_names([file[len(root) :].lstrip(os.sep) for file in others])}"
        )
    return kind, root, paths, notes


class _Listed(NamedTuple):
    """What a path stands for, before anything is chosen from it."""

    root: str | None  # the folder, where the path is one
    in_split: bool  # whether the folder has a sub-folder of the split's name
    found: list[str]
    notes: list[str]


def _list(path: str, split: str, what: str) -> _Listed | None:
    """None for a dataset on the Hub. Raises as `find_files`."""
    exists = not is_url(path) and os.path.exists(path)
    if (is_url(path) or os.path.isfile(path)) and without_query(path).lower().endswith(".txt"):
        return _Listed(None, False, *_find_all(_read_list(path, what), what))
    if not exists and BRACES.search(path):
        return _Listed(None, False, *_find_all(expand_braces(path), what))
    if is_url(path) and not has_wildcard(path) and kind_of(path) is None:
        root, found = list_folder(path)
        return _Listed(root, any(file.startswith(f"{root}{split}/") for file in found), found, [])
    if exists and os.path.isdir(path):
        root = os.path.abspath(path)
        in_split = os.path.isdir(os.path.join(root, split))
        folder = os.path.join(root, split) if in_split else root
        found, notes = _files_below(folder)
        if not found:
            nothing = f"found no images, tar or parquet files, and no others in {folder}."
            raise FileNotFoundError(f"{what}: {nothing} {'; '.join(notes)}".rstrip())
        return _Listed(root, in_split, found, notes)
    if exists and not os.path.isfile(path):
        raise ValueError(f"{what} is a pipe, socket or device; expected a file or a folder.")
    if exists or is_url(path) or glob.has_magic(path):
        return _Listed(None, False, *_find_all([path], what, may_be_none=True))
    if re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path):
        return None
    raise FileNotFoundError(f"{what} does not exist.{_about_braces([path])}")


def _files_below(folder: str) -> tuple[list[str], list[str]]:
    folders, notes = walk(folder)
    return [os.path.join(parent, name) for parent, names in folders for name in names], notes


def _splits_read_too(root: str, paths: list[str], split: str, where: str) -> list[str]:
    """Notes about the sub-folders of other splits, in a folder without one for this split."""
    names = [name for name in sorted(os.listdir(root)) if OTHER_SPLITS.match(name.lower())]
    names = [name for name in names if any(file.startswith(os.path.join(root, name, "")) for file in paths)]
    if not names:
        return []
    return [
        f"reads all images, as there is no sub-folder {split!r}: also those of {listed_names(names)}. To read one of"
        f" these, set {where}.split to its name"
    ]


def local_path(path: str) -> str:
    """The path on this machine, with the home folder in place of `~`; a URL of a server stays as it is."""
    return os.path.expanduser(re.sub(r"^(file|local):(//(localhost)?)?(?=[/~])", "", path))


def expand_braces(path: str) -> list[str]:
    """`{008..010}` -> 008, 009, 010 and `{a,b}` -> a, b, in all combinations.

    Raises:
        ValueError: there are more than ten million.
    """
    parts = BRACES.split(path)  # text, inside of braces, text, ...
    choices = [_choices(part, path) if number % 2 else [part] for number, part in enumerate(parts)]
    if math.prod(map(len, choices)) > MAX_EXPANDED:
        raise ValueError(f"{path!r} stands for more than {MAX_EXPANDED:,} files.")
    return ["".join(combination) for combination in itertools.product(*choices)]


def _choices(inside: str, path: str) -> list[str]:
    first, _, last = inside.partition("..")
    if not (first + last).isdecimal():
        return inside.split(",")
    step = 1 if int(first) <= int(last) else -1
    is_padded = any(len(bound) > 1 and bound.startswith("0") for bound in (first, last))
    width = max(len(first), len(last)) if is_padded else 0
    numbers = range(int(first), int(last) + step, step)
    if abs(int(last) - int(first)) >= MAX_EXPANDED:  # not len(numbers), which overflows
        raise ValueError(f"{path!r} stands for more than {MAX_EXPANDED:,} files.")
    return [f"{number:0{width}}" for number in numbers]


def _about_braces(paths: list[str]) -> str:
    """What to say about missing paths with braces that mean nothing here."""
    if not any("{" in path or "}" in path for path in paths):
        return ""
    return " Expected braces as in {00000..00999} or {a,b}, without steps, letters or other braces within."


def _read_list(path: str, what: str) -> list[str]:
    """The files, folders and patterns that a text file names; relative paths start from its own folder."""
    with open_stream(path) as file:
        content = file.read()
    if b"\0" in content:
        raise ValueError(f"{what} is not a text file; expected a list of files, one per line.")
    lines = [line.strip() for line in content.decode("utf-8-sig", "replace").splitlines()]
    paths = [local_path(line) for line in lines if line and not line.startswith("#")]
    if not paths:
        raise FileNotFoundError(f"{what} names no files; expected one per line.")
    folder = without_query(path).rpartition("/")[0] if is_url(path) else os.path.dirname(os.path.abspath(path))
    paths = [line if is_url(line) or os.path.isabs(line) else f"{folder}/{line}" for line in paths]
    return list(itertools.chain.from_iterable(map(expand_braces, paths)))


def _find_all(paths: list[str], what: str, may_be_none: bool = False) -> tuple[list[str], list[str]]:
    """(The files that these files, folders and patterns stand for; notes about what is left out.)"""
    found: list[str] = []
    notes: list[str] = []
    names: dict[str, set[str]] = {}  # local folder -> its files: looked at once, not for every file
    missing = []
    for path in paths:
        if is_url(path):
            if has_wildcard(path):
                matching = match(path)
            else:
                matching = [path] if kind_of(path) else list_folder(path)[1]
        elif kind_of(path) is None and os.path.isdir(path):
            matching, left_out = _files_below(os.path.abspath(path))
            notes += left_out
        elif glob.has_magic(path) and not os.path.exists(path):
            matching, left_out = match_local(os.path.abspath(path))
            notes += left_out
        else:
            folder, name = os.path.split(os.path.abspath(path))
            if folder not in names:
                names[folder] = file_names(folder) if os.path.isdir(folder) else set()
            matching = [os.path.join(folder, name)] if name in names[folder] else []
        found += matching
        missing += [] if matching else [path]
    if missing and not may_be_none:
        raise FileNotFoundError(
            f"{what}: {count(len(missing), 'file')} of {len(paths)} not found: {listed_names(missing)}."
            f"{_about_braces(missing)}"
        )
    if len(set(found)) < len(found):
        notes.append(f"left out {count(len(found) - len(set(found)), 'file')} named more than once")
    return found, list(dict.fromkeys(notes))


def _one_kind(found: list[str], is_folder: bool, what: str) -> tuple[str, list[str], list[str]]:
    """(Their kind, the files of this kind, notes about the others.)"""
    files: dict[str, list[str]] = {}
    unknown = Counter[str]()
    for file in found:
        kind, name = kind_of(file), without_query(file).rpartition("/" if is_url(file) else os.sep)[2]
        if kind is not None and not (name.startswith(".") and is_folder):
            files.setdefault(kind, []).append(file)
        else:
            unknown["hidden" if name.startswith(".") else os.path.splitext(name)[1].lower() or "without ending"] += 1
    notes = _leave_out_tables(files)
    kinds = [f"{number} {extension}" for extension, number in unknown.most_common()]
    if not files:
        raise FileNotFoundError(_nothing_found(found, kinds, what))
    if len(files) > 1:
        counts = ", ".join(f"{len(paths)} for {kind} such as {paths[0]}" for kind, paths in files.items())
        raise ValueError(f"{what} holds several kinds of files: {counts}. Give a pattern such as /data/*.tar.")
    if unknown:
        notes.append(f"left out {count(unknown.total(), 'file')} of other kinds: {listed_names(kinds)}")
    kind, paths = next(iter(files.items()))
    return kind, paths, notes


def _nothing_found(found: list[str], kinds: list[str], what: str) -> str:
    arrow = next((file for file in found if file.endswith(".arrow")), None)
    if arrow is not None and not is_url(arrow):
        folder = os.path.dirname(arrow)
        saved = os.path.exists(os.path.join(folder, "state.json"))
        load = f"load_from_disk({folder!r})" if saved else f"Dataset.from_file({arrow!r})"
        writer = ", as save_to_disk writes it" if saved else ""
        return (
            f"{what} holds a dataset in Arrow files{writer}; expected images, tar or parquet files. Write it as"
            f" parquet: datasets.{load}.to_parquet('train.parquet')"
        )
    among = f" among {len(found)} files there ({listed_names(kinds)})" if found else " there"
    advice = ""
    if is_url(what):
        advice = (
            " A server that does not list its files needs their names: .../{00000..00999}.tar, or a text file of URLs."
        )
    return f"{what}: found no images, tar or parquet files{among}.{advice}"


def _leave_out_tables(files: dict[str, list[str]]) -> list[str]:
    """Leaves out parquet files with the texts of a tar, or of a folder of images, of the same name; returns notes."""
    others = {file.rpartition(".")[0] for file in files.get("webdataset", [])}
    others |= {file.rpartition("/")[0] for file in files.get("imagefolder", [])}
    tables = [file for file in files.get("parquet", []) if others and file.rpartition(".")[0] in others]
    if not tables:
        return []
    files["parquet"] = sorted(set(files["parquet"]) - set(tables))
    if not files["parquet"]:
        del files["parquet"]
    names = listed_names([os.path.basename(file) for file in tables])
    return [f"left out {count(len(tables), 'parquet file')} beside tars or folders of the same name: {names}"]


def _common_folder(files: list[str]) -> str:
    """The deepest folder that all of them are in."""
    folders = {without_query(file).rpartition("/")[0] + "/" for file in files}
    return os.path.commonprefix(sorted(folders)).rpartition("/")[0]


def _beside_url(beside: list[str], root: str, split: str) -> list[str]:
    parts = sorted({file[len(root) :].partition("/")[0] for file in beside if kind_of(file)})
    others = [name for name in parts if not OTHER_SPLITS.match(name.lower())]
    if not others:
        return []
    return [f"reads only its sub-folder {split!r} and leaves out {listed_names(others)} beside it"]


def _beside(folder: str, split: str, where: str) -> list[str]:
    """Notes about what lies beside the split's sub-folder and may have been meant too: all but other splits."""
    real_split = os.path.realpath(os.path.join(folder, split))
    names, loose = [], []
    for name in sorted(name for name in os.listdir(folder) if not name.startswith(".")):
        real_path = os.path.realpath(os.path.join(folder, name))
        if os.path.isfile(real_path):
            loose += [name] if kind_of(name) else []
        elif os.path.commonpath([real_path, real_split]) == real_path:
            continue  # the split itself, or a link to a folder that holds it
        elif not OTHER_SPLITS.match(name.lower()) and _holds_data(real_path):
            names.append(name)
    if not names and not loose:
        return []
    parts = [f"{count(len(names), 'folder')} with data ({listed_names(names)})"] if names else []
    parts += [f"{count(len(loose), 'file')} ({listed_names(loose)})"] if loose else []
    return [
        f"reads only its sub-folder {split!r} and leaves out {' and '.join(parts)} beside it. To read one of the"
        f" folders, set {where}.split to its name or {where}.path to the folder; to read all, set {where}.path to a"
        f" pattern such as {os.path.join(folder, '**', '*.jpg')}"
    ]


def _holds_data(folder: str) -> bool:
    for _, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if any(kind_of(name) for name in names if not name.startswith(".")):
            return True
    return False


def _select_split(path: str, paths: list[str], split: str, where: str, by_name: bool) -> tuple[list[str], list[str]]:
    """(Files of the split, files that belong to no split and are left out.)"""
    if by_name:
        own = [file for file in paths if re.match(re.escape(split) + r"([^a-zA-Z0-9]|$)", os.path.basename(file))]
        others = [file for file in paths if not OTHER_SPLITS.match(os.path.basename(file))]
        if own:
            return own, sorted(set(others) - set(own))
        paths = others
    if split == "train" and paths:
        return paths, []
    names = sorted(entry.name for entry in os.scandir(path) if entry.is_dir()) if os.path.isdir(path) else []
    hint = f" Its sub-folders are {listed_names(names)}: set {where}.split to one of them." if names else ""
    raise ValueError(
        f"{where}.path={path!r} has no split {split!r}: neither a sub-folder nor files of this name.{hint}"
    )
