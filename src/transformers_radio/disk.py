"""Files on disk: written whole, locked, compared, and known by a digest. Every part of the package does it this way.

The standard library is all that this file imports, so that it costs nothing before torch is loaded.
"""

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

MAKE_ROOM = "make room on the disk, or mend it, and run the same command again"


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


def remove(path: Path) -> None:
    """Deletes a file or a folder with everything in it; nothing happens where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def writing(path: Path, fix: str = MAKE_ROOM, also: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turns what a full or broken disk raises into one OSError that names the file, the room left, and the fix.

    Args:
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
        raise OSError(
            f"{path} could not be written ({type(error).__name__}: {reason}; {nearest} has {free:,} bytes free): {fix}"
        ) from error


@contextmanager
def replace_whole(path: Path, unique: bool = False) -> Iterator[Path]:
    """Yields the path of a temporary file or folder beside `path`, which takes its place when the block ends.

    A reader never meets half of it, and a process that is killed leaves a file as it was before (a folder that is
    replaced may be gone). The folders above `path` are made. If the block raises, the temporary is deleted and `path`
    stays as it was.

    Args:
        unique: the temporary's name holds the process number, for files that several processes may write at once.
            Otherwise it is NAME.tmp, which the next attempt deletes, so that a kill leaves no garbage for long.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp" if unique else f"{path.name}.tmp")
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
    """Keeps other processes from writing `path` during the block, by a lock on the file .NAME.lock beside it.

    The folders above `path` are made. The lock goes with the process, however it ends.

    Raises:
        FileExistsError: another process holds it.
        OSError: nothing can be written there.
    """
    file = path.with_name(f".{path.name}.lock")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
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
