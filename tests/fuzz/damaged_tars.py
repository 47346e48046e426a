"""Headers and data of webdataset tars, plain and .gz, through the data stream and `count_images`."""

import functools
import gzip
import io
import shutil
import tarfile
from pathlib import Path

import numpy as np
from damage import choose, damage
from isolation import Case
from streams import check_count, check_stream, picture, read_all

BLOCK = 512
TYPES = b"\x00012345671gxLKSDV\xff"
SIZES = (
    b"77777777777\x00", b"\x80" + b"\x00" * 3 + b"\x7f" * 8, b"\x80" + b"\xff" * 11, b"\xff" * 12,
    b"\xff" + b"\x00" * 11, b"abcdefghijk\x00", b"00000000000\x00", b"            ", b"\x00" * 12,
    b"-1\x00" + b"\x00" * 9, b"00000100000\x00",
)  # fmt: skip
NAMES = (b"", b"/", b"../../x.jpg", b"no_ending", b"\xff\xfe.jpg", b".hidden.jpg", b"a" * 100, b"line\nbreak.jpg")


def prepare(folder: Path):
    """Three tars of four samples each, in two folders -> their images, by folder."""
    for kind in ("plain", "gz"):
        (folder / kind).mkdir()
        for shard in range(3):
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w") as tar:
                for number in range(4 * shard, 4 * shard + 4):
                    members = {"jpg": picture(number), "txt": b"a picture", "json": b'{"width": 24}' * 60}
                    for extension, data in members.items():
                        member = tarfile.TarInfo(f"{number:05}.{extension}")
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
            data = buffer.getvalue()
            name = f"{shard}.tar" if kind == "plain" else f"{shard}.tar.gz"
            (folder / kind / name).write_bytes(data if kind == "plain" else gzip.compress(data, mtime=0))
    return {kind: (folder / kind, read_all(folder / kind)[0]) for kind in ("plain", "gz")}


def draw(rng: np.random.Generator, world, folder: Path) -> Case:
    kind = choose(rng, ("plain", "plain", "gz"))
    sound_folder, sound = world[kind]
    assert len(sound) == 12
    shutil.copytree(sound_folder, folder / "data")
    path = choose(rng, sorted((folder / "data").iterdir()))
    data, detects, may_lose = path.read_bytes(), kind == "gz", 0
    where = choose(rng, ("header", "crafted", "zeroed header", "anywhere", "anywhere"))
    if kind == "plain" and where != "anywhere":
        with tarfile.open(path) as tar:
            header = choose(rng, [member.offset for member in tar.getmembers()])
        if where == "crafted":
            what, data = _crafted(rng, data, header)
            may_lose = 2  # itself, and the one that it would then describe
        elif where == "zeroed header":
            what, data = f"the header at {header} is zero", data[:header] + bytes(BLOCK) + data[header + BLOCK :]
        else:
            what, changed = damage(rng, data[header : header + BLOCK])
            what, data = f"the header at {header}: {what}", data[:header] + changed + data[header + BLOCK :]
    else:
        end = len(data) if kind == "gz" else len(data.rstrip(b"\0"))
        what, data = damage(rng, data, last=end)
    path.write_bytes(data)
    if rng.random() < 0.3:
        run = functools.partial(check_count, folder / "data", len(sound), may_lose)
        return Case(f"count_images, {path.name}: {what}", (path.name,), run)
    run = functools.partial(check_stream, folder / "data", sound, detects, may_lose, (path.name,))
    return Case(f"stream, {path.name}: {what}", (path.name,), run)


def _crafted(rng: np.random.Generator, data: bytes, header: int) -> tuple[str, bytes]:
    """A header whose checksum fits, as a broken or hostile writer leaves it."""
    place, width, values = choose(
        rng, [(124, 12, SIZES), (124, 12, SIZES), (156, 1, [bytes([kind]) for kind in TYPES]), (0, 100, NAMES)]
    )
    value = choose(rng, values)
    block = bytearray(data[header : header + BLOCK])
    block[place : place + width] = value.ljust(width, b"\0")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return f"bytes {place} on of the header at {header} are {value!r}", data[:header] + bytes(block) + data[
        header + BLOCK :
    ]
