"""Damaged and incomplete files: every image is read or counted, or one line names the file. `tarfile`, which read the
undamaged ones, knows how many there are."""

import bz2
import gzip
import io
import lzma
import os
import socket
import tarfile
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from helpers.sample_images import encode, picture
from transformers_radio.data import DataConfig, ImageStream, SourceError, count_images
from transformers_radio.evaluation.images.labeled import LabeledSplit

COUNT = 12
PHOTOS = [encode(picture(number, 20, 20)) for number in range(COUNT)]
BLOCK = tarfile.BLOCKSIZE


def tar_of(members: list[tuple[str, bytes]], **options) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


SOUND = tar_of([(f"{number:03}.jpg", photo) for number, photo in enumerate(PHOTOS)])
with tarfile.open(fileobj=io.BytesIO(SOUND)) as tar:
    MEMBERS = tar.getmembers()
END = MEMBERS[-1].offset_data + -(-MEMBERS[-1].size // BLOCK) * BLOCK
FORMS = {"tar": bytes, "gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


def place(data: bytes, where: str, folder) -> str:
    """Writes a tar to a disk or a store; its path."""
    if where == "store":
        MemoryFileSystem().pipe("/damage/a.tar", data)
        return "memory://damage/a.tar"
    (folder / "a.tar").write_bytes(data)
    return str(folder / "a.tar")


def images_of(path: str, **fields) -> list:
    source = ImageStream(DataConfig(path, num_workers=0, retry_seconds=0, **fields), [8], 1, 0).sources[""]
    return [image for shard in range(len(source.shards)) for _, image in source.records(shard)]


def errors_of(path: str) -> list[str]:
    """What reading and counting say, which both have to fail, in a line that names the file."""
    found = []
    for attempt in (images_of, lambda path: count_images(DataConfig(path, retry_seconds=0))):
        with pytest.raises((ValueError, OSError, SourceError)) as error:
            attempt(path)
        found.append(str(error.value))
        assert "a.tar" in found[-1] or "a.parquet" in found[-1]
        assert "\n" not in found[-1]
    return found


@pytest.mark.parametrize("where", ["disk", "store"])
@pytest.mark.parametrize("form", FORMS)
def test_a_tar_cut_at_any_block_is_refused(form, where, tmp_path):
    assert images_of(place(FORMS[form](SOUND), where, tmp_path)) == PHOTOS
    cuts = [*(member.offset for member in MEMBERS), MEMBERS[3].offset_data + BLOCK, END]
    for cut in cuts if form == "tar" else cuts[3::5]:
        assert all("end" in message for message in errors_of(place(FORMS[form](SOUND[:cut]), where, tmp_path)))
    for rest in range(1, 5):  # one block of zeros is an end; how many follow is up to the writer
        path = place(FORMS[form](SOUND[: END + rest * BLOCK]), where, tmp_path)
        assert images_of(path) == PHOTOS and count_images(DataConfig(path)) == COUNT
    if form != "tar":
        packed = FORMS[form](SOUND)
        for cut in (len(packed) // 3, len(packed) - 1):
            errors_of(place(packed[:cut], where, tmp_path))


@pytest.mark.parametrize("where", ["disk", "store"])
def test_a_bit_in_any_header_is_noticed(where, tmp_path):
    generator = np.random.default_rng(0)
    for member in MEMBERS:
        data = bytearray(SOUND)
        data[member.offset + int(generator.integers(148))] ^= 1 << int(generator.integers(8))  # not in the checksum
        for message in errors_of(place(bytes(data), where, tmp_path)):
            assert "expected the header of a member" in message and f"byte {member.offset + BLOCK:,}" in message


@pytest.mark.parametrize("form", ["gz", "bz2", "xz"])
def test_a_bit_in_a_compressed_tar_is_noticed(form, tmp_path):
    packed = FORMS[form](SOUND)
    for position in np.random.default_rng(1).integers(20, len(packed), 12):
        data = bytearray(packed)
        data[position] ^= 4
        errors_of(place(bytes(data), "disk", tmp_path))


def test_several_streams_of_gzip_are_one_file(tmp_path):
    half = len(SOUND) // 2
    for where in ("disk", "store"):
        path = place(gzip.compress(SOUND[:half]) + gzip.compress(SOUND[half:]), where, tmp_path)
        assert images_of(path) == PHOTOS and count_images(DataConfig(path)) == COUNT


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (SOUND + SOUND, "joined from several .*tar --concatenate"),
        (
            SOUND[: MEMBERS[2].offset] + bytes(MEMBERS[4].offset - MEMBERS[2].offset) + SOUND[MEMBERS[4].offset :],
            "zeros",
        ),
        (SOUND[: MEMBERS[6].offset] + bytes(2**21), "more than 1,048,576 zeros follow .*unfinished download"),
        (SOUND[:END], "head -c 1024 /dev/zero"),
        (b"", "at byte 0"),
        (b"<html>\nPlease log in" * 100, r"found a block that begins with b'<html>\\n"),
    ],
    ids=["joined", "a hole", "zeros", "no end", "empty", "a page"],
)
def test_what_is_no_whole_tar_is_named_with_the_fix(data, expected, tmp_path):
    import re

    for where in ("disk", "store"):
        assert all(re.search(expected, message) for message in errors_of(place(data, where, tmp_path)))


def with_size(size: bytes, number: int = 5) -> bytes:
    """The tar with another size in a header, and the checksum of it."""
    start = MEMBERS[number].offset
    header = bytearray(SOUND[start : start + BLOCK])
    header[124:136] = size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return SOUND[:start] + bytes(header) + SOUND[start + BLOCK :]


def base_256(size: int) -> bytes:
    return (size % 2**96 | (0 if size < 0 else 1 << 95)).to_bytes(12, "big")


@pytest.mark.parametrize(
    "size", [b"77777777777\0", base_256(2**63), base_256(2**80), base_256(-512), base_256(-(2**40))]
)
@pytest.mark.parametrize("form", ["tar", "gz"])
def test_a_stated_size_costs_neither_time_nor_memory(form, size, tmp_path):
    started = time.process_time()
    for where in ("disk", "store"):
        for message in errors_of(place(FORMS[form](with_size(size)), where, tmp_path)):
            assert "unexpected end of data" in message or "ends too early" in message or "states" in message
    assert time.process_time() - started < 2  # of one of 8 GB alone it was 9


def test_sizes_in_extended_headers_are_checked_too(tmp_path):
    for headers in ({"size": str(2**62)}, {"size": "-512"}, {"GNU.sparse.map": "0,1", "GNU.sparse.size": str(2**50)}):
        member = tarfile.TarInfo("a.jpg")
        member.pax_headers = headers
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
            tar.addfile(member)
            tar.addfile(tarfile.TarInfo("b.jpg"))
        with pytest.raises((SourceError, ValueError), match=r"a\.tar"):
            images_of(place(buffer.getvalue(), "disk", tmp_path))


def test_links_and_devices_in_a_tar_are_counted(tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number, photo in enumerate(PHOTOS):
            member = tarfile.TarInfo(f"a/{number:03}.jpg")
            kinds = {3: tarfile.LNKTYPE, 5: tarfile.SYMTYPE, 7: tarfile.FIFOTYPE}
            if number in kinds:
                member.type, member.linkname = kinds[number], "a/000.jpg"
                tar.addfile(member)
            else:
                member.size = len(photo)
                tar.addfile(member, io.BytesIO(photo))
        folder = tarfile.TarInfo("a/folder.jpg")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    path = place(buffer.getvalue(), "disk", tmp_path)
    assert count_images(DataConfig(path)) == COUNT
    stream = ImageStream(DataConfig(path, num_workers=0, max_skipped_share=1), [8], COUNT - 3, 0)
    batches = iter(stream)
    assert len(set(next(batches).keys)) == COUNT - 3
    assert next(batches).skipped["link or device in a tar"] >= 3


def test_a_name_a_second_time_is_another_sample(tmp_path):
    path = place(tar_of([("a.jpg", PHOTOS[0]), ("a.txt", b"x"), ("a.jpg", PHOTOS[1])]), "disk", tmp_path)
    assert images_of(path) == PHOTOS[:2] and count_images(DataConfig(path)) == 2


def test_the_evaluation_reads_no_less(tmp_path):
    members = [
        (f"{n:03}.{kind}", data) for n, photo in enumerate(PHOTOS) for kind, data in (("jpg", photo), ("cls", b"1"))
    ]
    data = tar_of(members)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        start = tar.getmembers()[10].offset
    for damaged in (data[:start], data[: start + 10] + b"!" + data[start + 11 :]):
        path = place(damaged, "disk", tmp_path)
        with pytest.raises(ValueError, match=r"a\.tar: .*(unexpected end|expected the header)"):
            list(LabeledSplit(path, "train").rows())


def test_the_error_of_a_worker_is_one_line_too(tmp_path):
    (tmp_path / "0.tar").write_bytes(SOUND)
    place(SOUND[: MEMBERS[-1].offset], "disk", tmp_path)
    stream = ImageStream(DataConfig(str(tmp_path), num_workers=1), [8], 4, 0)
    with pytest.raises(SourceError) as error:
        for _ in stream:
            pass
    assert str(error.value).startswith("Reading 'a.tar' of") and "\n" not in str(error.value)


def parquet_of(columns, names=None, **options) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns, names=names), buffer, **options)
    return buffer.getvalue()


def flipped(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


WHOLE = parquet_of({"image": PHOTOS})
CHECKED = parquet_of({"image": PHOTOS}, compression="none", use_dictionary=False, write_page_checksum=True)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "0 bytes"),
        (b"<html>\n</html>", "not a parquet file"),
        (WHOLE[:-100], "not a parquet file"),
        (WHOLE[: len(WHOLE) // 2] + WHOLE[-300:], ""),
        (WHOLE[:4] + b"\xff" * 40 + WHOLE[44:], ""),
        (flipped(CHECKED, CHECKED.index(PHOTOS[4]) + 200), "CRC"),
        (parquet_of([PHOTOS, PHOTOS], names=["image", "image"]), "2 columns have the name 'image'. Rename"),
        (parquet_of({"s": [{"image": {"bytes": photo}} for photo in PHOTOS]}), "'s' holds images among other things"),
    ],
    ids=["empty", "a page", "cut", "half", "a page header", "a bit", "two columns", "nested"],
)
def test_damaged_parquet_files_are_named_in_one_line(data, expected, tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(data)
    with pytest.raises((ValueError, OSError, SourceError)) as error:
        images_of(str(path))
    assert "a.parquet" in str(error.value) and expected in str(error.value) and "\n" not in str(error.value)
    try:
        assert count_images(DataConfig(str(path))) == COUNT  # the number of rows is at the end of the file
    except (ValueError, OSError) as counting:
        assert "a.parquet" in str(counting) and "\n" not in str(counting)


@pytest.mark.parametrize("damage", ["empty", "cut", "a page header"])
def test_the_evaluation_names_damaged_parquet_files(damage, tmp_path):
    whole = parquet_of({"image": PHOTOS, "label": [0] * COUNT})
    data = {"empty": b"", "cut": whole[:-100], "a page header": whole[:4] + b"\xff" * 40 + whole[44:]}[damage]
    (tmp_path / "a.parquet").write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.parquet cannot be read: ") as error:
        list(LabeledSplit(tmp_path / "a.parquet", "train").rows())
    assert "\n" not in str(error.value)


def test_columns_that_are_read_all_the_same(tmp_path):
    tables = {
        "dictionary": parquet_of({"image": pa.array(PHOTOS).dictionary_encode()}),
        "others": parquet_of([PHOTOS, [1] * COUNT, [2] * COUNT], names=["image", "label", "label"]),
    }
    for name, data in tables.items():
        (tmp_path / f"{name}.parquet").write_bytes(data)
        assert images_of(str(tmp_path / f"{name}.parquet")) == PHOTOS


def test_pipes_and_sockets_in_the_place_of_files(tmp_path, caplog):
    (tmp_path / "a").mkdir()
    os.mkfifo(tmp_path / "a" / "x.jpg")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "a" / "y.jpg"))
    (tmp_path / "a" / "1.jpg").write_bytes(PHOTOS[0])
    (tmp_path / "a" / "gone.jpg").symlink_to("nowhere")
    (tmp_path / "a" / "circle.jpg").symlink_to("circle.jpg")
    for path in (tmp_path / "a", tmp_path / "a" / "*.jpg"):
        stream = ImageStream(DataConfig(str(path), num_workers=0, max_skipped_share=1), [8], 1, 0)
        batches = iter(stream)
        keys = [key for _ in range(4) for key in next(batches).keys]
        assert set(keys) == {"1.jpg"} and set(stream.skipped) == {"missing"}
        assert "left out 2 pipes, sockets or devices: " in caplog.text
        caplog.clear()
    for name in ("b.tar", "c.parquet", "d.jpg", "e.txt"):
        os.mkfifo(tmp_path / name)
        (tmp_path / "list.txt").write_text(f"{name}\n")
        for path in (tmp_path / name, tmp_path / "list.txt"):
            with pytest.raises((ValueError, OSError), match=f"{name}.* is a pipe|not found: .*{name}"):
                count_images(DataConfig(str(path)))
        (tmp_path / f"link-{name}").symlink_to(name)  # of a list links are not looked at
        (tmp_path / "list.txt").write_text(f"link-{name}\n")
        with pytest.raises((ValueError, OSError), match="pipe|not found|found no"):
            stream = ImageStream(DataConfig(str(tmp_path / "list.txt"), num_workers=0), [8], 1, 0)
            stream.check()


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("{3..3}.tar", "1 file of 1 not found: .*/3.tar"),
        ("{0..}.tar", "does not exist. Expected braces as in"),
        ("{5..1..0}.tar", "does not exist. Expected braces as in"),
        ("{0..3.tar", "does not exist. Expected braces as in"),
        ("{{0..1},x}.tar", r"2 files of 2 not found: .*\. Expected braces as in"),
        ("one.txt", "1 file of 1 not found: .*nope.tar"),
        ("none.txt", "one per line"),
        ("image.txt", "is not a text file; expected a list of files"),
        ("folder.txt", "1 file of 1 not found: .*folder.tar"),
        ("empty", "no others in .*empty"),
        ("others", r"among 2 files there \(1 .heic, 1 .npz\)"),
    ],
)
def test_what_is_not_there_is_named(path, expected, tmp_path):
    for name in ("empty", "others", "folder.tar"):
        (tmp_path / name).mkdir()
    for name in ("a.heic", "b.npz"):
        (tmp_path / "others" / name).write_bytes(b"")
    lists = {"one": b"nope.tar\n", "none": b"# nothing\n", "image": PHOTOS[0], "folder": b"folder.tar"}
    for name, text in lists.items():
        (tmp_path / f"{name}.txt").write_bytes(text)
    with pytest.raises((FileNotFoundError, ValueError), match=expected) as error:
        ImageStream(DataConfig(str(tmp_path / path)), [8], 1, 0)
    assert f"data.path='{tmp_path / path}'" in str(error.value) and "\n" not in str(error.value)


def test_addresses_of_this_machine(tmp_path):
    place(SOUND, "disk", tmp_path)
    for start in ("file://localhost", "file://", "file:"):
        assert images_of(f"{start}{tmp_path}/a.tar") == PHOTOS


def test_files_that_a_link_to_a_folder_names_again(tmp_path, caplog):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.jpg").write_bytes(PHOTOS[0])
    (tmp_path / "b").symlink_to("a")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    assert len(images_of(f"{tmp_path}/*/*.jpg")) == 1
    assert f"left out 1 file that a link names again: {tmp_path}/b/1.jpg" in caplog.text


def test_images_of_other_splits_that_are_read_are_named(tmp_path, caplog):
    for name in ("Training", "val", "cats"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.jpg").write_bytes(PHOTOS[0])
    assert len(images_of(str(tmp_path))) == 3
    assert "reads all images, as there is no sub-folder 'train': also those of Training, val" in caplog.text


def test_too_many_lanes_are_refused_at_once(tmp_path):
    place(SOUND, "disk", tmp_path)
    with pytest.raises(ValueError, match=r"data\.lanes=1000000000000: expected .*at most 100000"):
        ImageStream(DataConfig(str(tmp_path), num_workers=1, lanes=10**12), [8], 1, 0)


def test_zeros_at_random_places(tmp_path):
    """Seeded damage of every kind: what is read adds up to what `tarfile` knows, or the file is named."""
    generator = np.random.default_rng(2)
    outcomes = set()
    for _ in range(150):
        data = bytearray(SOUND)
        start, blocks = int(generator.integers(END // BLOCK - 1)) * BLOCK, int(generator.integers(1, 6))
        data[start : min(start + blocks * BLOCK, END - BLOCK)] = bytes(min(blocks * BLOCK, END - BLOCK - start))
        path = place(bytes(data), "disk", tmp_path)
        try:
            images = images_of(path)
        except (ValueError, SourceError) as error:
            assert "a.tar" in str(error) and "\n" not in str(error)
            outcomes.add("refused")
        else:
            assert len(images) == COUNT == count_images(DataConfig(path))
            outcomes.add("read")
    assert outcomes == {"refused", "read"}
