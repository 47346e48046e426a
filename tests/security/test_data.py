"""Tars and images of strangers: nothing is written, no link is followed, and memory has a bound."""

import gzip
import io
import struct
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image

from helpers.sample_images import encode, picture
from transformers_radio import RadioImageProcessor
from transformers_radio.data import DataConfig, ImageStream, SourceError
from transformers_radio.data import tars as reader
from transformers_radio.data.errors import FileError
from transformers_radio.data.images import SkippedImage, decode_rgb
from transformers_radio.evaluation.segmentation.config import SegmentationData, SplitSource
from transformers_radio.evaluation.segmentation.data import SegmentationSplit

GIANT = 60_000  # pixels of a side: 3.6 gigapixels, 10 GB as RGB


def add(tar, name, content=b"", kind=tarfile.REGTYPE, link=""):
    member = tarfile.TarInfo(name)
    member.size, member.type, member.linkname = len(content), kind, link
    tar.addfile(member, io.BytesIO(content))


def read(path):
    return dict(reader.read_tar(str(path), ["jpg"], False, range(100)))


def test_a_tar_writes_nothing_and_follows_no_link(tmp_path):
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(encode(picture(1)))
    path = tmp_path / "data" / "train.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        add(tar, "../../up.jpg", encode(picture(2)))
        add(tar, f"{tmp_path}/absolute.jpg", encode(picture(3)))
        add(tar, "soft.jpg", kind=tarfile.SYMTYPE, link=str(secret))
        add(tar, "hard.jpg", kind=tarfile.LNKTYPE, link="../secret.jpg")
        add(tar, "device.jpg", kind=tarfile.CHRTYPE)
        add(tar, "pipe.jpg", kind=tarfile.FIFOTYPE)
        add(tar, "sound.jpg", encode(picture(4)))
    before = sorted(tmp_path.rglob("*"))
    found = read(path)
    assert found["../../up"] == encode(picture(2)) and found["sound"] == encode(picture(4))  # keys are only names
    for name in ("soft", "hard", "device", "pipe"):
        assert isinstance(found[name], SkippedImage) and "link or device" in str(found[name])
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("size", [2**31 + 1, 2**40, 2**62])
def test_the_size_that_a_header_states_takes_no_memory(size, tmp_path):
    path = tmp_path / "train.tar.gz"
    member = tarfile.TarInfo("a.jpg")
    member.size = size
    with gzip.open(path, "wb") as file:
        file.write(member.tobuf(tarfile.GNU_FORMAT) + b"\0" * 4096)
    with pytest.raises(FileError, match="states|unexpected end"):
        read(path)


def png(width, height, *chunks):
    """A PNG whose header states this size, with little in it."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", head), *chunks, (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks
    )


def jpeg(width, height):
    data = bytearray(encode(picture(0)))
    start = data.index(b"\xff\xc0")  # frame header: length (2), precision (1), height (2), width (2)
    data[start + 5 : start + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def webp(width, height):
    """The extended format, whose header states the canvas."""
    canvas = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + canvas + encode(picture(0), "WEBP")[12:]
    return b"RIFF" + struct.pack("<I", len(body)) + body


def bmp(width, height):
    data = bytearray(encode(picture(0), "BMP"))
    data[18:26] = struct.pack("<ii", width, height)
    return bytes(data)


def gif(width, height):
    data = bytearray(encode(picture(0).convert("P"), "GIF"))
    data[6:10] = struct.pack("<HH", width, height)
    return bytes(data)


BOMBS = {
    "png": png(GIANT, GIANT),
    "jpeg": jpeg(GIANT, GIANT),
    "webp": webp(16384, 16384),
    "bmp": bmp(GIANT, GIANT),
    "gif": gif(GIANT, GIANT),
    "many zeros in a png": encode(Image.new("1", (GIANT // 4, GIANT // 4)), "PNG"),
}


@pytest.fixture
def little_memory():
    """1 GiB beyond what the process has: a bomb would be a MemoryError, or kill the process."""
    resource = pytest.importorskip("resource")
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_images_that_state_a_giant_size(bomb, little_memory, tmp_path):
    with pytest.raises(SkippedImage) as refused:
        decode_rgb(bomb)
    assert refused.value.reason in ("too large", "undecodable", "truncated")
    (tmp_path / "bomb").write_bytes(bomb)
    with pytest.raises(ValueError, match="bomb"):
        RadioImageProcessor()(str(tmp_path / "bomb"))


def test_texts_and_profiles_of_a_png_do_not_unpack_to_gigabytes(little_memory):
    zeros = zlib.compress(b"\0" * 300_000_000, 9)
    image = decode_rgb(png(4, 4, (b"zTXt", b"a\0\0" + zeros), (b"iCCP", b"a\0\0" + zeros)))
    assert np.asarray(image).shape == (4, 4, 3)


def test_masks_have_the_same_bound(tmp_path, little_memory):
    for folder, content in (("images", encode(picture(0))), ("masks", png(GIANT, GIANT))):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / ("a.jpg" if folder == "images" else "a.png")).write_bytes(content)
    parts = [SplitSource(images="images", masks="masks")]
    data = SegmentationData(name="x", path=str(tmp_path), classes=["a"], splits={"train": parts})
    split = SegmentationSplit(data, "train")
    with pytest.raises(ValueError, match="The mask of a cannot be read"):
        split[0]


def test_a_folder_with_a_loading_script_runs_nothing(tmp_path, monkeypatch):
    """`datasets` once ran NAME/NAME.py."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "data.py").write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'trace')!r}).mkdir()")
    with pytest.raises((ValueError, OSError, SourceError)):
        ImageStream(DataConfig(str(folder), num_workers=0), [32], 2, 0).check()
    assert not (tmp_path / "trace").exists()
