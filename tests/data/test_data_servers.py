"""Web servers that do not send what they say, through fsspec's own client: never other images, nor an endless wait."""

import functools
import gzip
import http.server
import threading

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.http import HTTPFileSystem

from helpers.sample_images import encode, picture, write_tar
from transformers_radio.data import DataConfig, ImageStream, SourceError

PHOTOS = [encode(picture(number, 20, 20)) for number in range(12)]


class Liar(http.server.BaseHTTPRequestHandler):
    """Serves `files`; the first part of a path says what is wrong with the answer. Counts the answers."""

    files: dict[str, bytes]
    answers: list[str]
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        self.answers.append(self.path)

    def do_HEAD(self):
        self.do_GET(is_head=True)

    def do_GET(self, is_head=False):
        fault, name = self.path.strip("/").split("/")
        data = self.files[name]
        status, half = 200, len(data) // 2
        if "Range" in self.headers and fault != "norange":
            first, last = self.headers["Range"].removeprefix("bytes=").split("-")
            status, data = 206, data[int(first) : int(last) + 1]
            half = len(data) // 2
        length = {"short": half, "long": len(data) + 99}.get(fault, len(data))
        if fault == "page":
            data = b"<html>\n<h1>Please log in</h1>" * 99
            length = len(data)
        self.send_response(302 if fault == "circle" else status)
        self.send_header("Location", self.path)
        self.send_header("Connection", "close")  # said, or a client may ask once more where nobody listens
        self.send_header("Content-Length", "0" if fault == "circle" else str(length))
        self.end_headers()
        if not is_head and fault != "circle":
            self.wfile.write(data[: half if fault == "early" else length])


@pytest.fixture(scope="module")
def liar(tmp_path_factory):
    fsspec.register_implementation("http", HTTPFileSystem, clobber=True)
    root = tmp_path_factory.mktemp("served")
    write_tar(root / "a.tar", {f"{number:03}": {"jpg": photo} for number, photo in enumerate(PHOTOS)})
    table = pa.table({"image": PHOTOS * 20})
    pq.write_table(table, root / "a.parquet", compression="none", use_dictionary=False)
    files = {path.name: path.read_bytes() for path in root.iterdir()}
    files["a.tar.gz"] = gzip.compress(files["a.tar"])
    handler = type("Handler", (Liar,), {"files": files, "answers": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler)) as server:
        threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", handler.answers
        server.shutdown()


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.parquet"])
@pytest.mark.parametrize(
    ("fault", "is_retried"),
    [("short", False), ("long", True), ("early", True), ("page", False), ("circle", False), ("norange", False)],
)
def test_servers_that_do_not_say_what_they_send(fault, is_retried, name, liar, monkeypatch):
    fsspec.register_implementation("http", HTTPFileSystem, clobber=True)
    url, answers = liar
    pauses = []
    monkeypatch.setattr("transformers_radio.data.retry.time.sleep", pauses.append)
    monkeypatch.setattr("transformers_radio.data.retry.time.monotonic", lambda: sum(pauses))
    config = DataConfig(f"{url}/{fault}/{name}", num_workers=0, retry_seconds=4)
    answers.clear()

    def read() -> list:
        source = ImageStream(config, [8], 1, 0).sources[""]
        return [image for _, image in source.records(0)]

    if fault == "norange" and name != "a.parquet":
        assert read() == PHOTOS
        return
    with pytest.raises((ValueError, OSError, SourceError)) as error:
        read()
    assert name in str(error.value) and "\n" not in str(error.value) and len(answers) < 50
    assert bool(pauses) == is_retried
    if fault == "norange":
        assert "expected a server that states their size" in str(error.value)


def test_a_transfer_that_ends_early_is_taken_up_again(liar, monkeypatch):
    """With fsspec's own client, whose error for it carries the status 400."""
    fsspec.register_implementation("http", HTTPFileSystem, clobber=True)
    monkeypatch.setattr("transformers_radio.data.retry.time.sleep", lambda seconds: None)
    write = Liar.do_GET
    faults = ["", "early", "early"]  # the look at the columns, the first attempts to read

    def sometimes(self, is_head=False):
        if not is_head and faults:
            self.path = f"/{faults.pop(0) or 'sound'}/a.tar"
        write(self, is_head)

    monkeypatch.setattr(Liar, "do_GET", sometimes)
    source = ImageStream(DataConfig(f"{liar[0]}/sound/a.tar", num_workers=0), [8], 1, 0).sources[""]
    assert [image for _, image in source.records(0)] == PHOTOS and not faults
