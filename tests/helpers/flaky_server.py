"""A web server that fails on demand, and a client for it that tells failures as fsspec's own client does."""

import http.client
import json
import os
import socket
import threading
import time
import urllib.request
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

# A worker inherits what listens here, and would hold the port for a server that is meant to be gone.
_listening: set[socket.socket] = set()
os.register_at_fork(after_in_child=lambda: [listener.close() for listener in _listening])


class FlakyServer:
    """Serves the files of a folder. `failures` says what becomes of the next downloads, one after the other.

    "" is no failure, "503" an answer with that status; "cut" ends the connection half-way, "cut@1024" after so many
    bytes, and "short" half-way so that nobody can notice.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.failures: deque[str] = deque()
        self.downloads = 0
        self.port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        handler = type("Handler", (_Handler,), {"flaky": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self.port = self.server.server_port
        _listening.add(self.server.socket)
        threading.Thread(target=self.server.serve_forever, args=[0.02], daemon=True).start()

    def stop(self) -> None:
        """From here on connections are refused."""
        self.server.shutdown()
        _listening.discard(self.server.socket)
        self.server.server_close()

    def stop_for(self, seconds: float) -> None:
        self.stop()
        threading.Thread(target=lambda: (time.sleep(seconds), self.start()), daemon=True).start()


class _Handler(BaseHTTPRequestHandler):
    flaky: FlakyServer

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        if self.path.startswith("/api/datasets/"):  # what the Hub tells about a repository
            sizes = {path.name: path.stat().st_size for path in self.flaky.folder.iterdir()}
            tree = [{"type": "file", "path": name, "size": size, "oid": "0"} for name, size in sizes.items()]
            self.send(200, json.dumps(tree if "/tree/" in self.path else {"id": "owner/photos", "sha": "0"}).encode())
        else:
            self.flaky.downloads += 1
            self.answer(with_body=True, failure=self.flaky.failures.popleft() if self.flaky.failures else "")

    def answer(self, with_body: bool, failure: str = "") -> None:
        path = self.flaky.folder / self.path.rpartition("/")[2]
        if failure.isdigit():
            self.send(int(failure), b"")
        elif not path.exists():
            self.send(404, b"")
        else:
            data = path.read_bytes()
            if wanted := self.headers.get("Range"):
                first, last = wanted.removeprefix("bytes=").split("-")
                data = data[int(first) : int(last) + 1 if last else None]
            self.send(206 if wanted else 200, data, with_body, failure)

    def send(self, status: int, data: bytes, with_body: bool = True, failure: str = "") -> None:
        self.send_response(status)
        if failure != "short":
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if with_body:
            end = int(failure.partition("@")[2] or len(data) // 2) if failure else len(data)
            self.wfile.write(data[:end])
        self.close_connection = True


class HttpFileSystem(AbstractFileSystem):
    """http:// without aiohttp, for tests: every failed look-up is a FileNotFoundError, as in fsspec's own."""

    protocol = "http"

    def __init__(self, block_size=2**16, **options):
        super().__init__(block_size=block_size, **options)
        self.block_size = block_size

    @classmethod
    def _strip_protocol(cls, path):
        return path

    def info(self, path, **kwargs):
        try:
            with urllib.request.urlopen(urllib.request.Request(path, method="HEAD"), timeout=10) as answer:
                return {"name": path, "size": int(answer.headers["Content-Length"]), "type": "file"}
        except Exception as error:
            raise FileNotFoundError(path) from error

    def _open(self, path, mode="rb", block_size=None, cache_options=None, **kwargs):
        size, block_size = self.info(path)["size"], self.block_size if block_size is None else block_size
        # 0: one request for the whole file, read as it comes
        return _Blocks(self, path, mode, block_size, size=size, **kwargs) if block_size else _Stream(path)


class _Stream:
    def __init__(self, url: str):
        self.answer = urllib.request.urlopen(url, timeout=10)
        self.left = int(self.answer.headers.get("Content-Length") or -1)

    def read(self, count: int = -1) -> bytes:
        data = self.answer.read(count)  # of everything: raises by itself when the connection ends early
        if self.left >= 0 and count >= 0:
            self.left -= len(data)
            if len(data) < count and self.left:
                raise http.client.IncompleteRead(data, self.left)
        return data

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.answer.close()


class _Blocks(AbstractBufferedFile):
    def _fetch_range(self, start, end):
        request = urllib.request.Request(self.path, headers={"Range": f"bytes={start}-{end - 1}"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.read()
