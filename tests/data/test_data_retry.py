"""Servers that fail for a while, for real: the images come as if nothing had happened, or a clean error does."""

import gzip
import hashlib
import multiprocessing
import os
import ssl
import subprocess
import sys
import tarfile
import time
import types
import urllib.error
import zlib
from collections import deque

import aiohttp
import datasets
import fsspec
import httpx2
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fsspec.exceptions import FSTimeoutError
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from helpers.flaky_server import FlakyServer, HttpFileSystem
from helpers.sample_images import encode, picture, write_tar
from transformers_radio.data import Batch, DataConfig, ImageStream, SourceError
from transformers_radio.data.retry import is_temporary

COUNT = 24


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """24 images as a tar, a parquet file, and a parquet file that only names them."""
    root = tmp_path_factory.mktemp("served")
    blobs = [encode(picture(number), quality=95) for number in range(COUNT)]
    write_tar(root / "train.tar", {f"{number:03}": {"jpg": blob} for number, blob in enumerate(blobs)})
    pq.write_table(pa.table({"image": blobs}), root / "train.parquet", row_group_size=4)
    return root


@pytest.fixture
def server(files, monkeypatch):
    fsspec.register_implementation("http", HttpFileSystem, clobber=True)
    # datasets.config is changed by the stream
    for name in [name for name in vars(datasets.config) if name.startswith("STREAMING_")]:
        monkeypatch.setattr(datasets.config, name, getattr(datasets.config, name))
    server = FlakyServer(files)
    yield server
    server.failures.clear()
    server.stop()


@pytest.fixture
def short_pauses(monkeypatch):
    """Of the usual ones only enough that the server can come back."""
    clock = types.SimpleNamespace(monotonic=time.monotonic, sleep=lambda seconds: time.sleep(0.02))
    monkeypatch.setattr("transformers_radio.data.retry.time", clock)


class Clock:
    """Its seconds pass only while somebody sleeps. `pauses` says for how long each time."""

    def __init__(self):
        self.pauses: list[float] = []

    def monotonic(self) -> float:
        return sum(self.pauses)

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("transformers_radio.data.retry.time", clock)
    return clock


def stream_of(path, num_workers: int = 0, **fields) -> ImageStream:
    config = DataConfig(str(path), num_workers=num_workers, **{"lanes": 2, "shuffle_window": 3, **fields})
    return ImageStream(config, [16], batch_size=4, seed=3)


def take(stream: ImageStream, count: int) -> list[Batch]:
    batches = iter(stream)
    taken = [next(batches) for _ in range(count)]
    stream.close()
    return taken


def assert_same(found: list[Batch], expected: list[Batch]) -> None:
    assert [batch.keys for batch in found] == [batch.keys for batch in expected]
    assert [batch.skipped for batch in found] == [batch.skipped for batch in expected]
    assert all(torch.equal(ours.images[16], theirs.images[16]) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("file", ["train.tar", "train.parquet"])
def test_order_and_positions_are_those_of_a_server_that_never_fails(
    file, num_workers, server, files, short_pauses, caplog
):
    expected = take(stream_of(files / file), 14)
    stream = stream_of(f"{server.url}/{file}", num_workers)
    server.failures = deque(["503", "cut", "", "429", "cut", "500", "503", "cut", "short", "cut", "", "cut", "short"])
    if file == "train.parquet":  # blocks of a file are asked for one by one and have a length
        server.failures = deque(failure.replace("short", "cut") for failure in server.failures)
    batches, found = iter(stream), []
    for step in range(14):
        if step == 6:
            server.stop_for(0.1)
        found.append(next(batches))
    assert_same(found, expected)
    assert not server.failures
    if num_workers == 0:
        assert f"Reading '{file}' of {server.url}/{file} failed" in caplog.text
        assert "Trying again in 1 s" in caplog.text and "data.retry_seconds=300" in caplog.text
    state = stream.state_dict()
    stream.close()
    assert state["lanes"] == {**stream_of(files / file).state_dict(), **state}["lanes"]
    server.failures = deque(["cut", "503"])
    resumed = stream_of(files / file)
    resumed.load_state_dict(state)  # of the same file, elsewhere
    again = stream_of(f"{server.url}/{file}", num_workers)
    again.load_state_dict(state)
    assert_same(take(again, 5), take(resumed, 5))


def test_pauses_double_and_start_anew_after_every_success(server, clock):
    stream = stream_of(f"{server.url}/train.tar", lanes=1, shuffle_window=1)
    server.failures = deque(["503", "503", "503", "503", "cut", "503"])
    take(stream, 5)
    assert clock.pauses == [1, 2, 4, 8, 1, 2]  # half of the file came between


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_server_that_never_comes_back_is_a_clean_error_within_the_limit(server, num_workers, clock):
    stream = stream_of(f"{server.url}/train.tar", num_workers, retry_seconds=100)
    batches = iter(stream)
    next(batches)
    server.stop()
    # 1 + 2 + 4 + 8 + 16 + 32 seconds and the 37 that are left
    with pytest.raises(SourceError, match=r"train\.tar.*The server still fails \(tried for 100 s, 8 times\)"):
        while True:
            next(batches)
    assert not multiprocessing.active_children()
    server.start()


def test_retrying_can_be_turned_off(server):
    stream = stream_of(f"{server.url}/train.tar", retry_seconds=0)
    server.failures = deque(["503"])
    with pytest.raises(SourceError, match=r"503.*raise data\.retry_seconds"):
        take(stream, 1)


def test_what_is_missing_or_forbidden_is_not_waited_for(server, files, tmp_path, monkeypatch):
    clock = types.SimpleNamespace(monotonic=time.monotonic, sleep=lambda seconds: pytest.fail("waited"))
    monkeypatch.setattr("transformers_radio.data.retry.time", clock)
    with pytest.raises(ValueError, match=r"data\.path='http:.*missing\.tar' could not be opened"):
        stream_of(f"{server.url}/missing.tar")
    server.folder = tmp_path
    (tmp_path / "page.tar").write_text("<html>" + 2000 * "Please log in. ")
    with pytest.raises(ValueError, match=r"page\.tar.*could not be opened"):
        stream_of(f"{server.url}/page.tar")
    server.folder = files
    stream = stream_of(f"{server.url}/train.tar")
    server.failures = deque(["403"])
    with pytest.raises(SourceError, match=r"train\.tar.*403"):
        take(stream, 1)
    # Files on a disk: one that ends early, and one that is gone.
    with tarfile.open(files / "train.tar") as tar:
        inside_an_image = tar.getmembers()[22].offset_data + 10
    (tmp_path / "cut.tar").write_bytes((files / "train.tar").read_bytes()[:inside_an_image])
    for path in (tmp_path / "cut.tar", f"file://{tmp_path}/cut.tar"):
        with pytest.raises(SourceError, match=r"cut\.tar.*The file may be incomplete"):
            take(stream_of(path), 20)
    stream = stream_of(tmp_path / "cut.tar")
    (tmp_path / "cut.tar").unlink()
    with pytest.raises(SourceError, match=r"cut\.tar.*FileNotFoundError"):
        take(stream, 1)


def test_a_server_that_is_down_when_the_run_starts(server, files, short_pauses, caplog):
    expected = take(stream_of(files / "train.tar"), 3)
    server.stop_for(0.1)
    assert_same(take(stream_of(f"{server.url}/train.tar"), 3), expected)
    assert f"Opening {server.url}/train.tar failed" in caplog.text
    server.stop()
    with pytest.raises(ValueError, match=r"data\.path=.*could not be opened.*\(tried for \d s, \d+ times\)"):
        stream_of(f"{server.url}/train.tar", retry_seconds=0.3)
    server.start()


def test_images_that_a_record_only_names(server, tmp_path, short_pauses):
    """Of a folder of images on the Hub `datasets` hands over addresses."""
    (tmp_path / "photos").mkdir()
    for number in range(8):
        (tmp_path / "photos" / f"{number}.jpg").write_bytes(encode(picture(number)))
    server.folder = tmp_path / "photos"
    rows = {"image": [{"bytes": None, "path": f"{server.url}/{number}.jpg"} for number in range(8)]}
    rows["image"][5]["path"] = f"{server.url}/gone.jpg"
    features = datasets.Features({"image": datasets.Image()})
    pq.write_table(pa.table(rows, schema=features.arrow_schema), tmp_path / "train.parquet")
    server.failures = deque(["503", "", "429"])
    stream = stream_of(tmp_path / "train.parquet", max_skipped_share=0.5)
    batches = iter(stream)
    keys = [*next(batches).keys]
    server.stop_for(0.1)
    keys += next(batches).keys + next(batches).keys
    assert {f"train.parquet/{number}" for number in range(8) if number != 5} <= set(keys)
    assert set(stream.skipped) == {"missing"}
    server.stop()
    with pytest.raises(SourceError, match=r"Reading http://.*\.jpg of .*The server still fails"):
        take(stream_of(tmp_path / "train.parquet", retry_seconds=0.3), 1)
    server.start()


def test_a_hub_dataset_is_waited_for(files, tmp_path, clock, monkeypatch):
    """Not long for the first time, when a Hub that cannot be reached may mean a mistyped local path."""
    (tmp_path / "train.parquet").symlink_to(files / "train.parquet")
    load, answers = datasets.load_dataset_builder, deque([False] * 6)

    def sometimes(path, name):
        if not answers.popleft():
            raise ConnectionError("Couldn't reach the Hub")
        return load(str(tmp_path))

    monkeypatch.setattr(datasets, "load_dataset_builder", sometimes)
    expected = r"'owner/seen_once'.*no such local path exists.*Couldn't reach the Hub \(tried for 30 s, 6 times\)$"
    with pytest.raises(ValueError, match=expected):
        stream_of("owner/seen_once")
    assert clock.pauses == [1, 2, 4, 8, 15]
    answers.extend([False, False, True])
    stream_of("owner/seen_once")
    answers.extend([*[False] * 7, True])
    clock.pauses.clear()
    take(stream_of("owner/seen_once"), 2)  # a later stage
    assert not answers and clock.pauses == [1, 2, 4, 8, 16, 32, 60]


@pytest.mark.parametrize("error", [OfflineModeIsEnabled("offline"), FileNotFoundError("no such dataset")])
def test_a_hub_that_says_no_is_not_waited_for(error, clock, monkeypatch):
    def refuse(path, name):
        raise error

    monkeypatch.setattr(datasets, "load_dataset_builder", refuse)
    with pytest.raises(ValueError, match=f"no such local path exists.*{error}$"):
        stream_of("owner/photos")
    assert not clock.pauses


SCRIPT = """
import hashlib, sys, time

sleep = time.sleep
time.sleep = lambda seconds: sleep(seconds / 100)  # also the pauses of the Hub's client, within one of our attempts
from transformers_radio.data import DataConfig, ImageStream

for line in sys.stdin:
    if line.split():
        path = "hf://datasets/owner/photos/" + line.strip()
        config = DataConfig(path, num_workers=0, lanes=2, shuffle_window=3)
        batches = iter(ImageStream(config, [16], batch_size=4, seed=3))
        print("open", flush=True)
    else:
        batch = next(batches)
        print(hashlib.sha256(batch.images[16].numpy().tobytes()).hexdigest(), *batch.keys, flush=True)
"""


@pytest.fixture
def hub_reader(server, tmp_path):
    """Opens a file (its name) or reads the next batch ("") in a process whose Hub is the server. -> the answer."""
    environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )

    def read(order: str = "") -> list[str]:
        process.stdin.write(f"{order}\n")
        process.stdin.flush()
        return process.stdout.readline().split() or pytest.fail((tmp_path / "log").read_text())

    yield read
    process.kill()
    process.communicate()


def line_of(batch: Batch) -> list[str]:
    return [hashlib.sha256(batch.images[16].numpy().tobytes()).hexdigest(), *batch.keys]


def test_the_hub_through_its_own_client(server, files, hub_reader, tmp_path):
    """hf:// as it is read in earnest, from a server that speaks the little of the Hub's language that is needed."""
    # 1536 bytes each with their headers, so that one begins where the client's first two reads (512 + 10240) end.
    blobs = [encode(picture(number, 16, 16)).ljust(1024, b"\0") for number in range(COUNT)]
    assert {len(blob) for blob in blobs} == {1024}
    server.folder = tmp_path / "served"
    write_tar(server.folder / "small.tar", {f"{number:03}": {"jpg": blob} for number, blob in enumerate(blobs)})
    (server.folder / "train.tar").symlink_to(files / "train.tar")
    assert hub_reader("train.tar") == ["open"]
    server.failures = deque(["cut", *["503"] * 20, "cut", "cut", "", *["503"] * 13])
    for step, batch in enumerate(take(stream_of(files / "train.tar"), 12)):
        if step == 6:
            server.stop_for(0.1)
        assert hub_reader() == line_of(batch)
    assert not server.failures
    assert "Reading 'train.tar' of hf://datasets/owner/photos/train.tar failed" in (tmp_path / "log").read_text()
    # A failure between two files of a tar is not taken for its end. Read on, the Hub's client returns nothing after
    # these failures, which is how a tar ends.
    assert hub_reader("small.tar") == ["open"]
    server.failures = deque(["cut@10752", *["504"] * 6])
    for batch in take(stream_of(server.folder / "small.tar"), 6):
        assert hub_reader() == line_of(batch)
    assert not server.failures


def raised(error: Exception, cause: Exception | None = None) -> Exception:
    try:
        raise error from cause
    except Exception as caught:
        return caught


def http_error(status: int) -> httpx2.HTTPStatusError:
    request = httpx2.Request("GET", "http://x")
    return httpx2.HTTPStatusError("", request=request, response=httpx2.Response(status, request=request))


def foreign(library: str, **attributes) -> Exception:
    """An error as a library defines it that need not be installed."""
    return type("SomeError", (Exception,), {"__module__": f"{library}.exceptions", **attributes})()


def answer(status: int) -> dict:
    return {"ResponseMetadata": {"HTTPStatusCode": status}}


@pytest.mark.parametrize(
    ("error", "temporary"),
    [
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (FSTimeoutError(), True),
        (tarfile.ReadError("unexpected end of data"), True),
        (tarfile.ReadError("invalid header"), False),
        (EOFError("Compressed file ended before the end-of-stream marker was reached"), True),
        (gzip.BadGzipFile("CRC check failed"), False),
        (zlib.error("invalid distance"), False),
        (raised(aiohttp.ClientPayloadError(), aiohttp.http_exceptions.ContentLengthError("received 1 of 2")), True),
        (raised(FileNotFoundError(), aiohttp.TooManyRedirects(None, ())), False),
        (urllib.error.HTTPError("http://x", 503, "", {}, None), True),
        (urllib.error.HTTPError("http://x", 404, "", {}, None), False),
        (httpx2.ConnectError(""), True),
        (httpx2.RemoteProtocolError("peer closed connection"), True),
        (http_error(500), True),
        (http_error(429), True),
        (http_error(403), False),
        (HfHubHTTPError("", response=http_error(502).response), True),
        (HfHubHTTPError("", response=http_error(401).response), False),
        (OfflineModeIsEnabled(), False),
        (foreign("aiohttp"), True),
        (foreign("aiohttp", status=503), True),
        (foreign("aiohttp", status=404), False),
        (foreign("botocore", response=answer(500)), True),
        (foreign("botocore", response=answer(404)), False),
        (foreign("gcsfs", code=503), True),
        (FileNotFoundError(), False),
        (raised(FileNotFoundError(), foreign("aiohttp", status=503)), True),
        (raised(FileNotFoundError(), foreign("aiohttp", status=404)), False),
        (raised(ValueError("could not be opened"), ConnectionRefusedError()), True),
        (raised(PermissionError(), foreign("botocore", response=answer(403))), False),
        (raised(httpx2.ConnectError(""), ssl.SSLCertVerificationError()), False),
        (raised(OSError(), KeyError()), True),
        (ImportError("aiohttp"), False),
        (ValueError("a wrong column"), False),
        (KeyError(), False),
    ],
)
def test_which_errors_pass(error, temporary):
    assert is_temporary(error) is temporary
