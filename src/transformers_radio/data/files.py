"""Which files of a local path are read, and what is said about those that are not."""

import glob
import os
import re
from collections import Counter

from .images import EXTENSIONS

TAR, PARQUET = (".tar", ".tar.gz", ".tgz"), (".parquet",)
OTHER_SPLITS = re.compile(r"(train|training|val|valid|validation|dev|test|testing|eval)([^a-zA-Z0-9]|$)")
# Names and extensions that a message lists before it goes on with "and ... more".
MAX_LISTED = 5


def kind_of(name: str) -> str | None:
    """The builder of `datasets` that reads a file of this name: imagefolder, webdataset, parquet; None: none does."""
    lower = name.lower()
    if lower.endswith(TAR):
        return "webdataset"
    if lower.endswith(PARQUET):
        return "parquet"
    return "imagefolder" if lower.endswith(EXTENSIONS) else None


def find_files(path: str, split: str, where: str) -> tuple[str | None, str, list[str], list[str]]:
    """Find what `path` stands for.

    Args:
        path: as `DataConfig.path`.
        split: as `DataConfig.split`.
        where: the field of the recipe that holds path and split, for messages.

    Returns:
        (kind of the files, None for a dataset on the Hub; the folder that they are named from; the files, sorted;
        sentences about what is left out).

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: it is not clear which files to read.
    """
    if "://" in path:
        kind = kind_of(path)
        if kind not in ("webdataset", "parquet"):
            raise ValueError(f"{where}.path={path!r}: a URL must end in one of {', '.join(TAR + PARQUET)}.")
        return kind, os.path.dirname(path), [path], []
    if not os.path.exists(path) and not glob.has_magic(path):
        if re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path):
            return None, "", [], []
        raise FileNotFoundError(f"{where}.path={path!r} does not exist.")

    folder = os.path.abspath(path)
    in_split = os.path.isdir(os.path.join(folder, split))
    notes: list[str] = []
    if os.path.isdir(folder):
        listed, notes = _walk(os.path.join(folder, split) if in_split else folder)
        found = [os.path.join(parent, name) for parent, names in listed for name in names]
    elif os.path.isfile(folder):
        found = [folder]
    else:
        found, notes = _glob(folder)
    files: dict[str, list[str]] = {}
    unknown = Counter[str]()
    for file in sorted(found):
        kind = kind_of(file)
        name = os.path.basename(file)
        if kind is not None and not (name.startswith(".") and os.path.isdir(folder)):
            files.setdefault(kind, []).append(file)
        else:
            unknown["hidden" if name.startswith(".") else os.path.splitext(name)[1].lower() or "without ending"] += 1
    if not files:
        other = f" among {len(found)} files" if found else ""
        raise FileNotFoundError(f"{where}.path={path!r}: found no images, tar or parquet files{other} there.")
    if len(files) > 1:
        counts = ", ".join(f"{len(paths)} for {kind} such as {paths[0]}" for kind, paths in files.items())
        raise ValueError(
            f"{where}.path={path!r} holds several kinds of files: {counts}. Give a pattern such as /data/*.tar."
        )
    kind, paths = next(iter(files.items()))
    if unknown:
        kinds = [f"{count} {extension}" for extension, count in unknown.most_common()]
        notes.append(f"left out {_count(unknown.total(), 'file')} of other kinds: {_listed(kinds)}")
    if not os.path.isdir(folder):
        folder = os.path.commonpath([os.path.dirname(file) for file in paths])
    elif in_split:
        notes += _beside(folder, split, where)
    else:
        paths, others = _select_split(path, paths, split, where, by_name=kind != "imagefolder")
        if others:
            notes.append(
                f"left out {_count(len(others), 'file')} whose names do not start with {split!r}:"
                f" {_listed([os.path.relpath(file, folder) for file in others])}"
            )
    return kind, folder, paths, notes


def _walk(root: str) -> tuple[list[tuple[str, list[str]]], list[str]]:
    """-> (every folder from `root` on with the names of its files, sentences about what was left out).

    Hidden folders are left out. Links to folders are followed, but no folder is read twice: none that a link leads to
    a second time, and none that holds the root itself.
    """
    listed: list[tuple[str, list[str]]] = []
    refused: list[str] = []
    hidden: list[str] = []
    unreadable: list[OSError] = []
    real_root = os.path.realpath(root)
    read: set[str] = set()
    waiting = [root]
    for start in waiting:
        real_start = os.path.realpath(start)
        if real_start in read or (start != root and os.path.commonpath([real_start, real_root]) == real_start):
            refused.append(os.path.relpath(start, root))
            continue
        links = []
        for parent, folders, names in os.walk(start, onerror=unreadable.append):
            real_parent = os.path.realpath(parent)
            if real_parent in read:  # a link to it was met before the link to a folder above it
                folders.clear()
                continue
            read.add(real_parent)
            listed.append((parent, names))
            hidden += [os.path.relpath(os.path.join(parent, name), root) for name in folders if name.startswith(".")]
            folders[:] = [name for name in folders if not name.startswith(".")]  # walk goes into the others alone
            links += [link for name in folders if os.path.islink(link := os.path.join(parent, name))]
        waiting += sorted(links)  # after the folders that are really here, whatever order the disk lists them in
    notes = []
    if refused:
        notes.append(f"left out {_count(len(refused), 'link')} to folders that are read anyway: {_listed(refused)}")
    if hidden:
        notes.append(f"left out {_count(len(hidden), 'hidden folder')}: {_listed(sorted(hidden))}")
    if unreadable:
        reasons = [f"{error.filename} ({error.strerror})" for error in unreadable]
        notes.append(f"left out {_count(len(reasons), 'folder')} that cannot be opened: {_listed(reasons)}")
    return listed, notes


def _glob(pattern: str) -> tuple[list[str], list[str]]:
    """-> (the files that match, each once by its shortest path; sentences about what was left out).

    `glob.glob` by itself follows links in circles where it meets `**`, and with two of them for ever.
    """
    any_depth = os.sep + "**" + os.sep
    before, found, after = (pattern + os.sep + "*" if pattern.endswith(any_depth[:-1]) else pattern).partition(
        any_depth
    )
    if not found:
        return [file for file in glob.glob(pattern) if os.path.isfile(file)], []
    files, notes = [], []
    for root in filter(os.path.isdir, glob.glob(before or os.sep)):
        listed, left_out = _walk(root)
        notes += left_out
        for folder, _ in listed:
            matching, left_out = _glob(os.path.join(glob.escape(folder), after))
            files += matching
            notes += left_out
    real_folders = {folder: os.path.realpath(folder) for folder in {os.path.dirname(file) for file in files}}
    kept: dict[tuple[str, str], str] = {}
    for file in sorted(files, key=lambda file: (file.count(os.sep), file)):
        parent, name = os.path.split(file)
        kept.setdefault((real_folders[parent], name), file)
    return list(kept.values()), list(dict.fromkeys(notes))


def _beside(folder: str, split: str, where: str) -> list[str]:
    """What lies beside the sub-folder of the split and may have been meant too: all but other splits."""
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
    parts = [f"{_count(len(names), 'folder')} with data ({_listed(names)})"] if names else []
    parts += [f"{_count(len(loose), 'file')} ({_listed(loose)})"] if loose else []
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
    """-> (files of the split, files that belong to no split and are left out)."""
    if by_name:
        own = [file for file in paths if re.match(re.escape(split) + r"([^a-zA-Z0-9]|$)", os.path.basename(file))]
        others = [file for file in paths if not OTHER_SPLITS.match(os.path.basename(file))]
        if own:
            return own, sorted(set(others) - set(own))
        paths = others
    if split == "train" and paths:
        return paths, []
    names = sorted(entry.name for entry in os.scandir(path) if entry.is_dir()) if os.path.isdir(path) else []
    hint = f" Its sub-folders are {_listed(names)}: set {where}.split to one of them." if names else ""
    raise ValueError(
        f"{where}.path={path!r} has no split {split!r}: neither a sub-folder nor files of this name.{hint}"
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more
