"""Many files by URL: patterns, folders, ranges and lists, from a file system in memory and from a web server."""

import functools
import http.server
import threading

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.http import HTTPFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from helpers.sample_images import encode, picture, write_tar
from transformers_radio.data import DataConfig, ImageStream, SourceConfig, count_images, keep_files, list_files
from transformers_radio.data.files import expand_braces

COUNT = 24
EVERY_KEY = {f"{number // 8:05}.tar/{number:03}" for number in range(COUNT)}


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """24 images in 3 tars, with tables and statistics beside them as img2dataset writes them."""
    root = tmp_path_factory.mktemp("shards")
    for part in range(3):
        samples = {f"{n:03}": {"jpg": encode(picture(n)), "txt": b"x"} for n in range(part * 8, part * 8 + 8)}
        write_tar(root / f"{part:05}.tar", samples)
        pq.write_table(pa.table({"url": ["https://x/a.jpg"] * 8, "sha256": ["0"] * 8}), root / f"{part:05}.parquet")
        (root / f"{part:05}_stats.json").write_text("{}")
    return root


@pytest.fixture
def memory(local):
    """The same behind memory://shards, of which fsspec knows no more than of a store."""
    file_system = MemoryFileSystem()
    file_system.store.clear()
    for path in local.iterdir():
        file_system.pipe(f"/shards/{path.name}", path.read_bytes())
    yield "memory://shards"
    file_system.store.clear()


@pytest.fixture
def web(local, monkeypatch):
    """The same behind a web server with index pages, through fsspec's own client. Counts its answers."""
    fsspec.register_implementation("http", HTTPFileSystem, clobber=True)
    answers = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            answers.append(self.requestline)

    handler = functools.partial(Handler, directory=str(local.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/{local.name}", answers
        server.shutdown()


def stream_of(path, **fields) -> ImageStream:
    config = DataConfig(str(path), **{"num_workers": 0, "shuffle_window": 5, "retry_seconds": 0, **fields})
    return ImageStream(config, [16], batch_size=4, seed=3)


def keys_of(path, **fields) -> list[str]:
    source = stream_of(path, **fields).sources[""]
    return [key for shard in range(len(source.shards)) for key, _ in source.records(shard)]


def assert_reads_as(path, expected: ImageStream, **fields) -> None:
    """The same images in the same order, and positions of the one fit the other."""
    stream = stream_of(path, **fields)
    stream.check()
    for ours, theirs, _ in zip(stream, expected, range(9), strict=False):
        assert ours.keys == theirs.keys and bool((ours.images[16] == theirs.images[16]).all())
    stream.load_state_dict(expected.state_dict())


@pytest.mark.parametrize("form", ["", "/", "/*.tar", "/0000?.tar", "/{00000..00002}.tar", "/{00000,00001,00002}.tar"])
def test_many_tars_of_a_store(form, memory, local):
    assert_reads_as(memory + form, stream_of(local / "*.tar"))


@pytest.mark.parametrize("form", ["", "/", "/*.tar", "/{00000..00002}.tar"])
def test_many_tars_of_a_web_server(form, web, local):
    # Of a client that was used before the fork a worker must not keep anything.
    assert_reads_as(web[0] + form, stream_of(local / "*.tar"), num_workers=1 if form == "/*.tar" else 0)


def test_a_list_of_urls(memory, web, local, tmp_path):
    lines = [f"{memory}/00000.tar", f"{web[0]}/00001.tar?signature=abc", f"{local}/{{00002..00002}}.tar"]
    (tmp_path / "urls.txt").write_text("\n".join(["# two servers and a disk", "", *lines, ""]))
    keys = keys_of(tmp_path / "urls.txt")
    assert {key.rpartition("/")[2] for key in keys} == {f"{number:03}" for number in range(COUNT)}
    assert not any("signature" in key for key in keys)  # which changes, so that it is no part of a name
    fsspec.filesystem("memory").pipe("/shards/list.txt", b"00000.tar\r\n00002.tar\r\n")
    assert {key[:5] for key in keys_of(f"{memory}/list.txt")} == {"00000", "00002"}
    (tmp_path / "urls.txt").write_text("00000.tar\nnope.tar\n")
    (tmp_path / "00000.tar").symlink_to(local / "00000.tar")
    with pytest.raises(FileNotFoundError, match=r"urls\.txt': 1 file of 2 not found: .*nope\.tar"):
        stream_of(tmp_path / "urls.txt")


def test_images_by_url(web, tmp_path):
    """Of a list of images each is fetched when its turn comes."""
    for number in range(6):
        (tmp_path / f"{number}.jpg").write_bytes(encode(picture(number)))
    (tmp_path / "list.txt").write_text("{0..5}.jpg")
    assert_reads_as(f"file://{tmp_path}/list.txt", stream_of(tmp_path / "*.jpg"))
    file_system = MemoryFileSystem()
    for number in range(6):
        file_system.pipe(f"/photos/train/{number}.jpg", (tmp_path / f"{number}.jpg").read_bytes())
    file_system.pipe("/photos/val/7.jpg", b"")
    file_system.pipe("/photos/more/8.jpg", b"")
    stream = stream_of("memory://photos")
    stream.check()
    assert {key for batch, _ in zip(stream, range(6), strict=False) for key in batch.keys} == {
        f"train/{number}.jpg" for number in range(6)
    }
    assert stream.sources[""].notes == ["reads only its sub-folder 'train' and leaves out more beside it"]
    assert keys_of("memory://photos", split="val") == ["val/7.jpg"]


def test_the_files_of_img2dataset(memory, local):
    for path in (local, memory):
        stream = stream_of(path)
        notes = " ".join(stream.sources[""].notes)
        assert set(keys_of(path)) == EVERY_KEY
        assert "left out 3 parquet files beside tars or folders of the same name: 00000.parquet, 00001" in notes
        assert "left out 3 files of other kinds: 3 .json" in notes
    MemoryFileSystem().pipe("/shards/other.parquet", b"")
    with pytest.raises(ValueError, match="several kinds of files: 1 for parquet .*other.parquet, 3 for webdataset"):
        stream_of(memory)


def test_what_a_server_does_not_have(web, memory):
    url, _ = web
    with pytest.raises(ValueError, match=r"data\.path='http.*nope' could not be opened.*nope"):
        stream_of(f"{url}/nope")
    for path in (f"{url}/*.parquet.tar", f"{memory}/nope", f"{memory}/*.tgz"):
        with pytest.raises(
            FileNotFoundError, match=r"found no images.*\{00000\.\.00999\}\.tar, or a text file of URLs"
        ):
            stream_of(path)
    with pytest.raises(ValueError, match=r"00003\.tar' could not be opened as webdataset.*00003"):
        stream_of(f"{url}/00003.tar")


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a{08..11}.tar", ["a08.tar", "a09.tar", "a10.tar", "a11.tar"]),
        ("{9..11}", ["9", "10", "11"]),
        ("{3..1}", ["3", "2", "1"]),
        ("{a,b}/{0..1}", ["a/0", "a/1", "b/0", "b/1"]),
        ("{a,}.x", ["a.x", ".x"]),
        ("{a}{}", ["{a}{}"]),
        ("plain", ["plain"]),
    ],
)
def test_braces_mean_what_they_mean_to_a_shell(pattern, expected):
    assert expand_braces(pattern) == expected


def test_braces_for_too_many_files():
    with pytest.raises(ValueError, match="more than 10,000,000 files"):
        stream_of("s3://bucket/{0..999999999999}.tar")


def test_ranges_of_local_files(local, tmp_path, monkeypatch):
    assert set(keys_of(local / "{00000..00002}.tar")) == EVERY_KEY
    assert {key[:5] for key in keys_of(f"{local}/{{00000,00002}}.t*r")} == {"00000", "00002"}
    with pytest.raises(FileNotFoundError, match=r"2 files of 5 not found: .*00003\.tar, .*00004\.tar"):
        stream_of(local / "{00000..00004}.tar")
    (tmp_path / "{0..1}.tar").symlink_to(local / "00001.tar")  # a file of this very name is itself
    assert [key.rpartition("/")[2] for key in keys_of(tmp_path / "{0..1}.tar")] == [f"{n:03}" for n in range(8, 16)]
    monkeypatch.setenv("HOME", str(local.parent))
    config = DataConfig(sources={"a": SourceConfig(f"~/{local.name}/*.tar"), "b": SourceConfig(f"~/{local.name}")})
    assert count_images(config) == 2 * COUNT
    (tmp_path / "list.txt").write_text(f"~/{local.name}/00001.tar")
    assert len(keys_of(tmp_path / "list.txt")) == 8


def test_a_run_lists_its_files_once(memory, local, web):
    """What another process has found is used as it is: no server or disk is asked again, nor are late files seen."""
    url, answers = web
    config = DataConfig(sources={"web": SourceConfig(url), "disk": SourceConfig(f"{local}/*.tar")}, num_workers=0)
    found = list_files(config)
    assert {key[0]: [file[-9:] for file in one.files] for key, one in found.items()} == {
        url: [f"{part:05}.tar" for part in range(3)],
        f"{local}/*.tar": [f"{part:05}.tar" for part in range(3)],
    }
    with keep_files(found):
        answers.clear()
        stream = ImageStream(config, [16], batch_size=4, seed=3)
        assert [line.split()[1][-9:] for line in answers] and not any(line.endswith("/ HTTP/1.1") for line in answers)
        extra = local / "00003.tar"
        extra.symlink_to(local / "00002.tar")
        try:
            assert (
                len(ImageStream(config, [16], 4, 3).sources["disk"].shards) == len(stream.sources["disk"].shards) == 3
            )
        finally:
            extra.unlink()
    with pytest.raises(FileNotFoundError):
        stream_of(local / "00003.tar")


def test_traffic_is_said_when_files_are_read_more_than_once(memory, caplog):
    stream_of(f"{memory}/*.tar", lanes=8)
    size = len(MemoryFileSystem().cat("/shards/00000.tar"))
    assert "an epoch reads every file 8.0 times" in caplog.text and f"{8 * 3 * size / 1e9:,.0f} GB" in caplog.text
    assert "3 files are dealt out to 8 lanes. With data.lanes=1 or less each is read once" in caplog.text
    caplog.clear()
    stream_of(f"{memory}/*.tar", lanes=3)
    assert "an epoch reads" not in caplog.text
    table = pa.table({"image": [encode(picture(number)) for number in range(64)]})
    for group, warned in ((4, False), (64, True)):
        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer, row_group_size=group)
        MemoryFileSystem().pipe(f"/rows/{group}.parquet", buffer.getvalue().to_pybytes())
        stream_of(f"memory://rows/{group}.parquet", lanes=8)
        assert ("an epoch reads every file 8.0 times" in caplog.text) is warned


def test_lanes_share_the_row_groups_of_a_file(memory, monkeypatch):
    """Each row is read once, in the order of a local copy, and a row group by hardly more than one lane."""
    rows, group = 96, 6
    buffer = pa.BufferOutputStream()
    table = pa.table({"image": [encode(picture(number % 7, 20, 20)) for number in range(rows)]})
    pq.write_table(table, buffer, row_group_size=group)
    MemoryFileSystem().pipe("/rows/train.parquet", buffer.getvalue().to_pybytes())
    read = []
    iter_batches = pq.ParquetFile.iter_batches

    def spy(self, size, row_groups, columns, **options):
        read.extend(row_groups)
        return iter_batches(self, size, row_groups, columns, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)
    stream = stream_of("memory://rows/train.parquet", lanes=4)
    source = stream.sources[""]
    parts = [
        [int(key.rpartition("/")[2]) for key, _ in source.records(0, source.part(0, part, 7))] for part in range(7)
    ]
    assert [row for part in parts for row in part] == list(range(rows))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert len(read) <= rows // group + 6  # interleaved it would be 7 times the groups
    seen = [key for batch, _ in zip(stream, range(rows // 4), strict=False) for key in batch.keys]
    assert len(set(seen)) == rows and np.unique(seen).size == rows


def test_positions_saved_before_there_were_row_ranges(tmp_path):
    """They say nothing about ranges: every n-th row of a file was a part of it, and still is for them."""
    table = pa.table({"image": [encode(picture(number, 20, 20)) for number in range(40)]})
    pq.write_table(table, tmp_path / "train.parquet", row_group_size=5)

    def opened() -> ImageStream:
        return stream_of(tmp_path, lanes=4, shuffle_window=1)

    stream = opened()
    state = stream.state_dict()
    assert state["order"].pop("row_ranges") is True
    stream.load_state_dict(state)
    assert "row_ranges" not in stream.state_dict()["order"]
    batches = iter(stream)
    for _ in range(8):
        next(batches)
    # 32 parts of one file: part p holds rows p and p + 32
    expected = {part: [row for row in range(40) if row % 32 == part] for part in range(32)}
    source = stream.sources[""]
    for part, rows in expected.items():
        assert [int(key.rpartition("/")[2]) for key, _ in source.records(0, source.part(0, part, 32))] == rows
    again = opened()
    again.load_state_dict(stream.state_dict())
    assert [next(iter(again)).keys] == [next(batches).keys]
    assert opened().state_dict()["order"]["row_ranges"] is True
