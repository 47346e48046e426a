"""Images from webdataset tars: only the image of each sample is read, whatever lies beside it."""

import bz2
import contextlib
import gzip
import itertools
import lzma
import os
import re
import tarfile
from collections.abc import Iterator
from typing import IO, Any

from .columns import choose, stem
from .config import SourceConfig
from .images import EXTENSIONS, SkippedImage
from .remote import is_url, named, open_stream, size_of
from .retry import is_temporary

# Number of samples per tar, and of tars, that are looked at to learn which extension is the image's.
SAMPLES_LOOKED_AT = 20
TARS_LOOKED_AT = 20
# Names are split as webdataset splits them: the key ends at the first dot of the file's own name; the field follows.
NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")
# Bytes that are read at once, so that a header that states too large a size takes no memory.
PIECE = 2**20
# The largest file that is read into memory. Pillow refuses images of far fewer pixels.
LARGEST_FILE = 2**31
# Zeros after the end of a tar: writers fill up to 10 KiB; the largest records of tapes are below this.
LARGEST_PADDING = 2**20


def find_fields(files: list[str], config: SourceConfig, where: str) -> list[str]:
    """The fields that hold the images of the first samples.

    Raises:
        ColumnError: a sample has several, or none has any; the message says how to choose.
        FileError, OSError: a tar cannot be read.
    """
    samples: list[list[str]] = []
    for file in files[:TARS_LOOKED_AT]:  # the first ones may be empty
        by_key: dict[str, list[str]] = {}
        with open_tar(file) as tar:
            for _, _, key, field in _members(tar):
                by_key.setdefault(key, []).append(field)
                if len(by_key) > SAMPLES_LOOKED_AT:
                    break
        samples += by_key.values()
        fields = list(dict.fromkeys(itertools.chain.from_iterable(samples)))
        images = [field for field in fields if is_image(field)]
        if config.image_column in fields or (config.image_column is None and images):
            break
    return choose(samples, images, config, where)


def is_image(field: str) -> bool:
    return f".{field}".lower().endswith(EXTENSIONS)


def read_tar(
    path: str, fields: list[str], is_given: bool, indices: range
) -> Iterator[tuple[str, bytes | SkippedImage | None]]:
    """Yields (key, image file or None) of the samples with these numbers.

    Args:
        fields: from `find_fields`. A sample without them may have its image under another extension at the same place:
            beside KEY.jpg that is KEY.PNG, but not KEY.mask.png.
        is_given: whether the recipe names the field, so that no other is read.
    """
    for key, image, _ in read_samples(path, fields, is_given, indices):
        yield key, image


def read_samples(
    path: str, fields: list[str], is_given: bool, indices: range, beside: str | None = None
) -> Iterator[tuple[str, bytes | SkippedImage | None, bytes | None]]:
    """As `read_tar`, with the content of the field `beside` (such as "cls") of each sample, or None.

    An image that is a link is replaced by the error that it is counted as.

    Raises:
        FileError, OSError: the tar is damaged or incomplete, or cannot be read.
    """
    place = stem(fields[0])
    last, current = -1, ""
    found: dict[str, bytes | SkippedImage] = {}
    label: bytes | None = None
    with open_tar(path) as tar:
        for number, member, key, field in _members(tar):
            if number != last:
                if last in indices:
                    yield current, _first(found, fields), label
                last, current, found, label = number, key, {}, None
            wanted = field in fields if is_given else field in fields or (is_image(field) and stem(field) == place)
            if number in indices:
                if field == beside:
                    label = _content(tar, member) if member.isreg() else None
                elif wanted:
                    found[field] = _content(tar, member) if member.isreg() else SkippedImage("link or device in a tar")
        if last in indices:
            yield current, _first(found, fields), label


def count_samples(path: str) -> int:
    """The number of samples in a tar; on a disk, only the headers are read.

    Raises:
        FileError, OSError: as `read_samples`.
    """
    with open_tar(path) as tar:
        return max((number + 1 for number, *_ in _members(tar)), default=0)


class Header(tarfile.TarInfo):
    """A header that is an error if damaged or missing; `tarfile` itself takes both for the end of the tar."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str | None, errors: str) -> "Header":
        if len(buf) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError(
                "unexpected end of data: expected another member, or the two blocks of zeros that end a tar (to one"
                " that is known to be whole, add them with `head -c 1024 /dev/zero >> FILE`)"
            )
        try:
            return super().frombuf(buf, encoding, errors)  # type: ignore[arg-type]
        except tarfile.HeaderError as error:
            if not any(buf):
                raise
            raise tarfile.ReadError(
                f"expected the header of a member, found a block that begins with {bytes(buf[:20])!r} ({error})"
            ) from None


class Forward:
    """What `tarfile` reads from: piece by piece, whatever size a header states, and only forward.

    Args:
        file: needs only `read`, which may return less than it is asked for.
        size: in bytes, for a file on a disk, in which positions can be sought.
    """

    def __init__(self, file: IO[bytes], size: int | None = None):
        self.file = file
        self.size = size
        self.position = 0
        self.ahead = b""
        self.has_ended = False

    def peek(self, count: int) -> bytes:
        self.ahead = self.read(count)
        self.position -= len(self.ahead)
        return self.ahead

    def read(self, count: int = PIECE) -> bytes:
        if not 0 <= count <= LARGEST_FILE:
            raise tarfile.ReadError(f"a header states {count} bytes; expected 0 to {LARGEST_FILE}")
        pieces, left = [], count
        while left:
            if piece := self.ahead[:left]:
                self.ahead = self.ahead[left:]
            elif self.has_ended or not (piece := self.file.read(min(left, PIECE))):
                self.has_ended = self.size is None  # aiohttp warns about reading further
                break
            pieces.append(piece)
            left -= len(piece)
        self.position += count - left
        return b"".join(pieces)

    def seek(self, position: int) -> None:
        if self.size is not None and position <= self.size:
            self.file.seek(position)
            self.position, self.ahead = position, b""
        while self.position < position:
            if not self.read(min(position - self.position, PIECE)):
                break
        if self.position != position:
            raise tarfile.ReadError("unexpected end of data")

    def tell(self) -> int:
        return self.position


@contextlib.contextmanager
def open_tar(path: str) -> Iterator[tarfile.TarFile]:
    """Opens a tar, compressed or not. On a server everything is read once, in order.

    Raises:
        FileError: also later, within the block, if what is read proves to be damaged or incomplete.
    """
    with named(path), open_stream(path) as stream:
        stored = Forward(stream, None if is_url(path) else os.fstat(stream.fileno()).st_size)
        file = stored
        try:
            if decompressed := _decompressed(stored):
                file = Forward(decompressed)
            with tarfile.open(fileobj=file, mode="r:", tarinfo=Header) as tar:  # type: ignore[call-overload]
                yield tar
        except (tarfile.ReadError, EOFError) as error:
            at = f"at byte {file.tell():,}" + (" when decompressed" if file is not stored else "")
            if is_url(path) and is_temporary(error) and stored.tell() == _stated_size(path):
                # the transfer has not ended early: a second one would end there too
                reason = str(error).replace("unexpected end of data", "the file ends too early")
                raise tarfile.ReadError(f"{reason}, {at}") from None
            raise type(error)(f"{error}, {at}") from None


def _decompressed(file: Forward) -> Any:
    start = file.peek(10)
    if start.startswith(b"\x1f\x8b"):
        return gzip.open(file)  # type: ignore[call-overload]
    if start.startswith(b"BZh") and start[4:] == b"1AY&SY":
        return bz2.open(file)  # type: ignore[call-overload]
    if start.startswith((b"\xfd7zXZ", b"\x5d\x00\x00\x80")):
        return lzma.open(file)  # type: ignore[call-overload]
    return None


def _stated_size(url: str) -> int | None:
    try:
        return size_of(url)
    except Exception:  # the server is gone for now
        return None


def _members(tar: tarfile.TarFile) -> Iterator[tuple[int, tarfile.TarInfo, str, str]]:
    """Yields (number of the sample, member, key of the sample, field). Hidden files belong to no sample."""
    file: Any = tar.fileobj
    number, current = -1, ""
    fields: set[str] = set()
    while (member := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]  # TarFile keeps every header that it has read
        if tar.offset < file.tell() or (file.size is not None and tar.offset > file.size):
            there = "" if file.size is None else f" in a file of {file.size:,}"
            raise tarfile.ReadError(
                f"unexpected end of data: the header of {member.name!r} states {member.size:,} bytes{there}"
            )
        name = NAME.fullmatch(member.name)
        is_file = member.isreg() or member.islnk() or member.issym() or member.isdev()
        if name and is_file and not os.path.basename(member.name).startswith((".", "__")):
            if name[1] != current or name[2] in fields:  # a repeated name begins another sample
                number, current, fields = number + 1, name[1], set()
            fields.add(name[2])
            yield number, member, name[1], name[2]
    _check_end(file)


def _check_end(file: Forward) -> None:
    """Checks what follows the block of zeros at the end of a tar."""
    padding = 0
    while piece := file.read():
        padding += len(piece)
        if piece.strip(b"\0"):
            raise tarfile.ReadError(
                "data follow the block of zeros that ends a tar: a part of it was overwritten with zeros, or it was"
                " joined from several (keep them apart, or join them with `tar --concatenate`)"
            )
        if padding > LARGEST_PADDING:
            raise tarfile.ReadError(
                f"more than {LARGEST_PADDING:,} zeros follow the end of the tar, as in an unfinished download"
            )


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    if member.size > LARGEST_FILE:
        raise tarfile.ReadError(
            f"the header of {member.name!r} states {member.size:,} bytes; expected at most {LARGEST_FILE:,}"
        )
    content = tar.extractfile(member)
    assert content is not None  # as the member is a regular file
    return content.read()


def _first(found: dict[str, bytes | SkippedImage], fields: list[str]) -> bytes | SkippedImage | None:
    """The image of a sample that has several: one with an extension of the first samples, else the first one."""
    return next((found[field] for field in (*fields, *found) if field in found), None)
