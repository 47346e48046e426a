"""Files on disk: written whole, locked, compared, and known by a digest. Every part of the package does it this way.

The standard library is all that this file imports, so that it costs nothing before torch is loaded.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

MINE = ".transformers_radio"  # in the names of what is temporary, so that no file of a user has one of them
MAKE_ROOM = "make room on the disk, or mend it, and run the same command again"
OTHER_PLACE = "choose a place that can be written to, or make this one so, and run the same command again"
# Errors of the place, which room on the disk would not mend.
OF_THE_PLACE = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOENT),
    *(errno.ENAMETOOLONG, errno.ELOOP),
}
IN_FOLDER = (f"{MINE}.tmp", f"{MINE}.lock")  # what `new_folder` keeps in a folder that is there


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


def remove(path: Path) -> None:
    """Deletes a file or a folder with everything in it; nothing happens where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_writable(path: Path, name: str) -> None:
    """Raises OSError, which calls the path `name`, when nothing can be written at `path`. Changes nothing."""
    absolute = path.absolute()
    nearest = next(one for one in (absolute, *absolute.parents) if one.exists() or one.is_symlink())
    if not nearest.exists():
        reason = f"is a link to {os.readlink(nearest)}, which is not there"
    elif not nearest.is_dir():
        reason = "is not a folder"
    elif not os.access(nearest, os.W_OK | os.X_OK):
        reason = "may not be written into"
    else:
        return
    raise OSError(f"{name} {path} cannot be written: {nearest} {reason}; choose another {name}")


def check_new(folder: Path, name: str, source: str | Path) -> None:
    """Raises before long work unless `folder` is new or empty and can be written. Changes nothing.

    Args:
        name: what the command calls the folder.
        source: a folder that is read meanwhile, into which nothing may be written; anything else is no matter here.

    Raises:
        FileExistsError: there is a file, or a folder with something in it.
        OSError: nothing can be written there.
        ValueError: it lies in the source.
    """
    if folder.exists() and (not folder.is_dir() or any(path.name not in IN_FOLDER for path in folder.iterdir())):
        raise FileExistsError(f"{folder} exists already; give a new folder, or remove it")
    check_writable(folder, name)
    if os.path.isdir(source) and folder.resolve().is_relative_to(Path(source).resolve()):
        raise ValueError(f"{name} {folder} lies in {source}, which is read; choose a folder outside of it")


@contextmanager
def writing(path: Path, note: str = "", also: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turns what a full, broken or closed disk raises into one OSError: the file, the reason, the room left, the fix.

    Args:
        note: what the message says before the fix.
        also: exceptions of the library that writes, besides OSError and RuntimeError (which is PyTorch's).
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, (OSError, RuntimeError, *also)):
            raise
        nearest = existing(path.absolute())
        free = shutil.disk_usage(nearest).free
        reason = " ".join(str(error).split())
        fix = note + (OTHER_PLACE if isinstance(error, OSError) and error.errno in OF_THE_PLACE else MAKE_ROOM)
        raise OSError(
            f"{path} could not be written ({type(error).__name__}: {reason}; {nearest} has {free:,} bytes free): {fix}"
        ) from error


def temporary_path(path: Path, unique: bool = False) -> Path:
    """Where `replace_whole` keeps what is to become `path`: hidden, beside it, and marked as this package's."""
    return path.with_name(f".{path.name}.{os.getpid()}{MINE}.tmp" if unique else f".{path.name}{MINE}.tmp")


@contextmanager
def replace_whole(path: Path, unique: bool = False) -> Iterator[Path]:
    """Yields the path of a temporary file or folder beside `path`, which takes its place when the block ends.

    A reader never meets half of it, and a process that is killed leaves a file as it was before (a folder that is
    replaced may be gone). The folders above `path` are made. If the block raises, the temporary is deleted and `path`
    stays as it was.

    Args:
        unique: the temporary's name holds the process number, for files that several processes may write at once.
            Otherwise the next attempt deletes it, so that a kill leaves no garbage for long.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path, unique)
    remove(temporary)
    try:
        yield temporary
        if path.is_dir() and temporary.is_dir():  # os.replace does not replace a folder that holds something
            remove(path)
        os.replace(temporary, path)
    except BaseException:
        remove(temporary)
        raise


def write_text(path: Path, text: str) -> Path:
    """Writes UTF-8 text whole, and returns the path."""
    with replace_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def write_json(path: Path, value: Any) -> Path:
    """Writes a value as indented JSON, whole, and returns the path."""
    return write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def lock_folder(folder: Path, message: str) -> IO[str]:
    """Takes the folder's lock, the file .lock, for this process; the folder is made.

    Returns:
        The lock, to be kept open while the folder is written into. The system releases it however the process ends.

    Raises:
        FileExistsError: with `message`, when another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / ".lock").open("a")
    if fcntl is not None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.close()
            raise FileExistsError(message) from error
    return lock


@contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """Keeps other processes from writing `path` during the block, by a lock on a hidden file beside it.

    The folders above `path` are made. The lock goes with the process, however it ends.

    Raises:
        FileExistsError: another process holds it.
        OSError: nothing can be written there.
    """
    with _locked(path.with_name(f".{path.name}{MINE}.lock"), path):
        yield


@contextmanager
def _locked(file: Path, path: Path) -> Iterator[None]:
    """Holds the lock `file`, which is made and deleted, for the work on `path`."""
    with writing(path):
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = file.open("a")
    with lock:
        if fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise FileExistsError(
                    f"another process is writing {path} now: wait until it is done, or choose another place"
                ) from error
        try:
            yield
        finally:
            with suppress(OSError):  # Windows does not delete open files
                file.unlink()


@contextmanager
def new_folder(folder: Path, name: str, source: str | Path) -> Iterator[Path]:
    """Yields the path of a temporary folder, to be made, whose content is that of `folder` when the block ends.

    One process at a time. An empty folder that is there is filled, not replaced: it may be a link, another disk, or
    where the user stands. A kill leaves all of it or nothing, and of a folder that was there at worst some files,
    without its config.json. If the block raises, nothing stays.

    Args:
        name, source: as for `check_new`, which is asked first.

    Raises:
        FileExistsError: the folder has something in it, or another process is writing it.
        OSError, ValueError: as `check_new`.
    """
    check_new(folder, name, source)
    is_there = folder.is_dir()
    temporary, lock = (folder / own for own in IN_FOLDER) if is_there else (temporary_path(folder), None)
    with only_writer(folder) if lock is None else _locked(lock, folder):
        check_new(folder, name, source)  # another process may have been writing
        remove(temporary)  # of a process that was killed
        try:
            yield temporary
            check_new(folder, name, source)
            with writing(folder):
                if is_there:
                    for file in sorted(temporary.iterdir(), key=lambda file: file.name == "config.json"):
                        os.rename(file, folder / file.name)
                    temporary.rmdir()
                else:
                    os.rename(temporary, folder)
        except BaseException:
            remove(temporary)
            raise


def digest(parts: Iterable[bytes | str]) -> str:
    """A hash of all parts one after another, 32 hexadecimal digits."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        state.update(part.encode() if isinstance(part, str) else part)
    return state.hexdigest()


def fingerprint_files(files: Iterable[str], folder: str | Path) -> str:
    """A hash of the names below `folder`, sizes and dates of local files. Moving the folder does not change it."""
    status = ((file, os.stat(file)) for file in files)
    return digest(repr((os.path.relpath(file, folder), one.st_size, one.st_mtime_ns)) for file, one in status)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one: "outer.inner" -> value. An empty dictionary is a value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def setting(settings: Any, name: str) -> Any:
    """The value at "outer.inner"; None where there is none."""
    for part in name.split("."):
        settings = settings.get(part) if isinstance(settings, dict) else None
    return settings


def differences(
    there: dict[str, Any],
    here: dict[str, Any],
    counted: Sequence[str] | None = None,
    is_free: Callable[[str], bool] = lambda name: False,
) -> list[str]:
    """Which settings of finished or begun work differ from today's: ["k (20 there, 10 here)"], empty if none do.

    Args:
        there, here: settings as a file holds them, and as they are wanted.
        counted: the names to compare, "outer.inner" for nested ones; None for all.
        is_free: whether a setting of this name may differ.
    """
    there, here = json.loads(json.dumps([there, here]))  # as a file gives them back: tuples are lists
    if counted is None:
        there, here = flatten(there), flatten(here)
        pairs = {name: (there.get(name), here.get(name)) for name in sorted({**there, **here})}
    else:
        pairs = {name: (setting(there, name), setting(here, name)) for name in counted}
    return [
        f"{name} ({one!r} there, {other!r} here)"
        for name, (one, other) in pairs.items()
        if one != other and not is_free(name)
    ]
