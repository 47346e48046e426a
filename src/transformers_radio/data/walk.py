"""Local folders and patterns -> files, links followed once, and notes about folders that are not read."""

import fnmatch
import glob
import os

# Number of names that a message lists before "and ... more".
MAX_LISTED = 5


def walk(root: str) -> tuple[list[tuple[str, list[str]]], list[str]]:
    """(Every folder from `root` on with the names of its files, notes about what was left out.)

    Hidden folders are left out. Links to folders are followed, but no folder is read twice: neither one that a second
    link leads to, nor one that holds the root itself.
    """
    listed: list[tuple[str, list[str]]] = []
    refused: list[str] = []
    hidden: list[str] = []
    special: list[str] = []
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
        inside = [start]
        while inside:
            parent = inside.pop()
            real_parent = os.path.realpath(parent)
            if real_parent in read:  # a link to it came before the link to a folder above it
                continue
            try:
                folders, names, others = _look_into(parent)
            except OSError as error:
                unreadable.append(error)
                continue
            read.add(real_parent)
            listed.append((parent, names))
            special += [os.path.relpath(os.path.join(parent, name), root) for name in others]
            hidden += [os.path.relpath(os.path.join(parent, name), root) for name in folders if name.startswith(".")]
            paths = [os.path.join(parent, name) for name in folders if not name.startswith(".")]
            inside += [path for path in paths if not os.path.islink(path)]
            links += [path for path in paths if os.path.islink(path)]
        waiting += sorted(links)  # after the folders that are really here, whatever order the disk lists them in
    notes = []
    if refused:
        notes.append(
            f"left out {count(len(refused), 'link')} to folders that are read anyway: {listed_names(refused)}"
        )
    if hidden:
        notes.append(f"left out {count(len(hidden), 'hidden folder')}: {listed_names(sorted(hidden))}")
    notes += _about_special(special)
    if unreadable:
        reasons = [f"{error.filename} ({error.strerror})" for error in unreadable]
        notes.append(f"left out {count(len(reasons), 'folder')} that cannot be opened: {listed_names(reasons)}")
    return listed, notes


def match_local(pattern: str) -> tuple[list[str], list[str]]:
    """(The files that match, each once by its shortest path; notes about what was left out.)

    With `**`, `glob.glob` itself follows links in circles; with two of them, endlessly.
    """
    files, notes = _match(pattern)
    real_folders = {folder: os.path.realpath(folder) for folder in {os.path.dirname(file) for file in files}}
    kept: dict[tuple[str, str], str] = {}
    for file in sorted(files, key=lambda file: (file.count(os.sep), file)):
        parent, name = os.path.split(file)
        kept.setdefault((real_folders[parent], name), file)
    again = sorted(set(files) - set(kept.values()))
    if again:
        notes.append(f"left out {count(len(again), 'file')} that a link names again: {listed_names(again)}")
    return list(kept.values()), list(dict.fromkeys(notes))


def _match(pattern: str) -> tuple[list[str], list[str]]:
    any_depth = os.sep + "**" + os.sep
    before, found, after = (pattern + os.sep + "*" if pattern.endswith(any_depth[:-1]) else pattern).partition(
        any_depth
    )
    if not found:
        return _match_in_folders(pattern)
    files, notes = [], []
    for root in filter(os.path.isdir, glob.glob(before or os.sep)):
        listed, left_out = walk(root)
        notes += left_out
        for folder, _ in listed:
            matching, left_out = _match(os.path.join(glob.escape(folder), after))
            files += matching
            notes += left_out
    return files, notes


def _match_in_folders(pattern: str) -> tuple[list[str], list[str]]:
    """`glob.glob` of a pattern without `**`: only files, and without asking the disk about each of them."""
    folder, name = os.path.split(pattern)
    if not glob.has_magic(name):
        return [file for file in glob.glob(pattern) if os.path.isfile(file)], []
    files: list[str] = []
    special: list[str] = []
    for parent in glob.glob(folder):
        try:
            _, names, others = _look_into(parent)
        except OSError:
            continue  # as `glob` does with what is not a folder, or cannot be opened
        is_hidden_meant = name.startswith(".")
        for found, places in ((names, files), (others, special)):
            places += [
                os.path.join(parent, one)
                for one in found
                if fnmatch.fnmatch(one, name) and (is_hidden_meant or not one.startswith("."))
            ]
    return files, _about_special(special)


def file_names(folder: str) -> set[str]:
    """The names of the files in a folder. A link counts as a file: looking at each of very many would take long."""
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries if entry.is_symlink() or entry.is_file(follow_symlinks=False)}


def _look_into(folder: str) -> tuple[list[str], list[str], list[str]]:
    """(Names of folders; of files, and of links to nowhere, which will be missed; of pipes, sockets and devices.)"""
    folders: list[str] = []
    files: list[str] = []
    special: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                kind = folders if entry.is_dir() else files if entry.is_file() else None
            except OSError:  # a link in a circle
                kind = files
            if kind is None:
                kind = special if os.path.exists(entry.path) else files
            kind.append(entry.name)
    return folders, files, special


def _about_special(names: list[str]) -> list[str]:
    what = "1 pipe, socket or device" if len(names) == 1 else f"{len(names)} pipes, sockets or devices"
    return [f"left out {what}: {listed_names(names)}"] if names else []


def count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def listed_names(names: list[str]) -> str:
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more
