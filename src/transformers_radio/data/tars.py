"""Images out of webdataset tars: of each sample the image alone is read, whatever lies beside it."""

import contextlib
import itertools
import os
import re
import tarfile
from collections.abc import Iterator

from .columns import choose, stem
from .config import SourceConfig
from .images import EXTENSIONS
from .remote import is_url, open_stream

# Samples of a tar, and tars, that are looked at to learn which extension is the image's.
SAMPLES_LOOKED_AT = 20
TARS_LOOKED_AT = 20
BESIDE = ""  # not the name of any field
# As webdataset splits names: the key ends at the first dot of the file's own name, the field is the rest.
NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")


def find_fields(files: list[str], config: SourceConfig, where: str) -> list[str]:
    """The fields that hold the images of the first samples.

    Raises:
        ColumnError: a sample has several, or none has any; the message says how to choose.
        tarfile.TarError, OSError: a tar cannot be read.
    """
    samples: list[list[str]] = []
    for file in files[:TARS_LOOKED_AT]:  # the first ones may be empty
        by_key: dict[str, list[str]] = {}
        with open_tar(file) as tar:
            for _, key, field in _members(tar):
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


def read_tar(path: str, fields: list[str], is_given: bool, indices: range) -> Iterator[tuple[str, bytes | None]]:
    """Yield (key, image file or None) of the samples of these numbers.

    Args:
        fields: from `find_fields`. Of another sample an image of any extension is read that stands at the same place:
            where these are KEY.jpg, also KEY.PNG but not KEY.mask.png.
        is_given: the recipe names the field, so that no other is read.
    """
    for key, image, _ in read_samples(path, fields, is_given, indices):
        yield key, image


def read_samples(
    path: str, fields: list[str], is_given: bool, indices: range, beside: str | None = None
) -> Iterator[tuple[str, bytes | None, bytes | None]]:
    """As `read_tar`, with the content of the field `beside` (such as "cls") of each sample, or None."""
    place = stem(fields[0])
    number, current = -1, ""
    found: dict[str, bytes] = {}
    with open_tar(path) as tar:
        for member, key, field in _members(tar):
            if key != current:
                if number in indices:
                    yield current, _first(found, fields), found.pop(BESIDE, None)
                number, current, found = number + 1, key, {}
            wanted = field in fields if is_given else field in fields or (is_image(field) and stem(field) == place)
            if (wanted or field == beside) and number in indices:
                content = tar.extractfile(member)
                assert content is not None  # of a regular file
                found[BESIDE if field == beside else field] = content.read()
        if number in indices:
            yield current, _first(found, fields), found.pop(BESIDE, None)


def count_samples(path: str) -> int:
    """From the headers alone, where the tar lies on a disk."""
    with open_tar(path) as tar:
        return sum(1 for _ in itertools.groupby(_members(tar), key=lambda member: member[1]))


@contextlib.contextmanager
def open_tar(path: str) -> Iterator[tarfile.TarFile]:
    # On a disk what is not wanted is skipped; from a server everything is read once, in order.
    with open_stream(path) as file, tarfile.open(fileobj=file, mode="r|*" if is_url(path) else "r:*") as tar:
        yield tar


def _members(tar: tarfile.TarFile) -> Iterator[tuple[tarfile.TarInfo, str, str]]:
    """Yield (member, key of its sample, field). Hidden files belong to none."""
    while (member := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]  # a tar keeps every header that it has read
        name = NAME.fullmatch(member.name)
        if name and member.isreg() and not os.path.basename(member.name).startswith((".", "__")):
            yield member, name[1], name[2]


def _first(found: dict[str, bytes], fields: list[str]) -> bytes | None:
    """A sample with images of several extensions: one that the first samples had, else the first that is there."""
    images = (field for field in (*fields, *found) if field in found and field != BESIDE)
    return next((found[field] for field in images), None)
