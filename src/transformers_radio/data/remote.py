"""Files by URL, through fsspec: http, s3, the Hub and everything else that it knows."""

import contextlib
import errno
import os
import posixpath
import stat
from collections.abc import Iterator
from typing import Any, BinaryIO

from .errors import ColumnError, FileError, one_line
from .retry import is_temporary

# On web servers "?" starts a query, as in signed addresses; elsewhere it stands for any letter.
WEB = ("http://", "https://")


def is_url(path: str) -> bool:
    return "://" in path


def without_query(path: str) -> str:
    return path.partition("?")[0] if path.startswith(WEB) else path


def has_wildcard(url: str) -> bool:
    path = url.partition("://")[2].partition("/")[2]
    return any(letter in path for letter in ("*[" if url.startswith(WEB) else "*[?"))


@contextlib.contextmanager
def open_stream(path: str) -> Iterator[BinaryIO]:
    """Opens a file that is read from beginning to end: with one request, if the server can do that."""
    if not is_url(path):
        with open_local(path) as file:
            yield file
        return
    file_system, inner = _file_system(path)
    streams = path.startswith((*WEB, "hf://"))
    with file_system.open(inner, "rb", block_size=0) if streams else file_system.open(inner, "rb") as file:
        yield file


@contextlib.contextmanager
def open_ranges(path: str) -> Iterator[BinaryIO]:
    """Opens a file of which parts are read: each with one request of its own size."""
    if not is_url(path):
        with open_local(path) as file:
            yield file
        return
    file_system, inner = _file_system(path)
    with file_system.open(inner, "rb", cache_type="none") as file:
        yield file


def open_local(path: str) -> BinaryIO:
    """Opens a regular file for reading. Anything else is refused: a pipe would block, a device may have no end.

    Raises:
        OSError: it is missing, cannot be opened, or is not a regular file.
    """
    try:
        number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise FileNotFoundError(errno.ENOENT, "Is a link that leads to itself", path) from None
        raise
    mode = os.fstat(number).st_mode
    if stat.S_ISREG(mode):
        return open(number, "rb")
    os.close(number)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "Is a folder; expected a file", path)
    raise OSError(errno.EINVAL, "Is a pipe or device; expected a regular file", path)


@contextlib.contextmanager
def named(path: str) -> Iterator[None]:
    """Turns what libraries raise about the content of a file into one line with its name.

    Raises:
        FileError: in place of any error but a ColumnError and an OSError that names the file itself.
    """
    try:
        yield
    except (ColumnError, FileError):
        raise
    except Exception as error:
        if isinstance(error, FileNotFoundError | PermissionError) or getattr(error, "filename", None) is not None:
            raise
        advice = " The file may be incomplete: replace it and resume, or remove it and start anew."
        if is_url(path) and is_temporary(error):
            advice = ""
        raise FileError(f"{path}: {type(error).__name__}: {one_line(error).rstrip('.')}.{advice}") from error


def size_of(url: str) -> int | None:
    """The size of a file in bytes; None if the server does not state it."""
    file_system, inner = _file_system(url)
    return file_system.info(inner).get("size")


def list_folder(url: str) -> tuple[str, list[str]]:
    """(The folder as fsspec spells it, with "/" at its end; all files in it and below it.)"""
    file_system, inner = _file_system(url)
    folder = file_system.unstrip_protocol(inner).rstrip("/") + "/"
    found = file_system.find(folder, on_error="raise") if url.startswith(WEB) else file_system.find(inner)
    return folder, _files(file_system, found)


def match(url: str) -> list[str]:
    """The files that match a pattern."""
    file_system, inner = _file_system(url)
    # unless told otherwise, fsspec leaves out folders of a web server that cannot be listed at the moment
    options = {"on_error": "raise"} if url.startswith(WEB) else {}
    found = file_system.glob(inner, detail=True, **options)
    return _files(file_system, [path for path, info in found.items() if info.get("type") != "directory"])


def _files(file_system: Any, found: list[str]) -> list[str]:
    # The index page of a web server links to itself with "?C=M;O=A", for another order of its lines.
    return [file_system.unstrip_protocol(path) for path in found if not posixpath.basename(path).startswith("?")]


def _file_system(url: str) -> tuple[Any, str]:
    import fsspec

    options = {"client_kwargs": {"trust_env": True}} if url.startswith(WEB) else {}  # proxies from the environment
    return fsspec.core.url_to_fs(url, **options)
