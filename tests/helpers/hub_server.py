"""The part of the Hub's API that publishing and loading use, for the real huggingface_hub client.

Repositories live in memory. Xet is left out, so the client has to be told HF_HUB_DISABLE_XET=1.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class HubServer:
    """`commits` has, for each repository, its versions in order: (revision, path -> content).

    Attributes:
        private: repository -> whether it was made private.
        stored: sha256 -> content of the large files that have arrived, with or without a commit.
        uploads: sha256 of every large file that the client has begun to send, in order.
        hang_after: from so many uploads on, the next ones are taken and never answered; None for never.
        refuse_commits: a message with which commits are refused.
    """

    def __init__(self):
        self.commits: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.private: dict[str, bool] = {}
        self.stored: dict[str, bytes] = {}
        self.uploads: list[str] = []
        self.hang_after: int | None = None
        self.refuse_commits: str | None = None
        self.hangs, self.released = threading.Event(), threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        threading.Thread(target=self.server.serve_forever, args=[0.02], daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    @property
    def environment(self) -> dict[str, str]:
        """For a fresh process whose Hub this is."""
        return {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_of_a_test"}

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes] | None:
        versions = self.commits.get(repo, [])
        wanted = [files for name, files in versions if name == revision] if revision != "main" else []
        return wanted[0] if wanted else (versions[-1][1] if revision == "main" and versions else None)

    def stop(self) -> None:
        self.released.set()
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            self.send_info(found[1], found[2] or "main")
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", path):
            self.send_tree(found[1], found[2], found[3] or "")
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.send_file(found[1], found[2], found[3])
        else:
            self.send_json(404, {"error": f"no {path}"})

    def do_POST(self) -> None:
        path, body = unquote(urlsplit(self.path).path), self.body()
        if path == "/api/repos/create":
            wanted = json.loads(body)
            repo = f"{wanted['organization']}/{wanted['name']}" if wanted.get("organization") else wanted["name"]
            if repo in self.hub.commits:
                return self.send_json(409, {"error": "exists", "url": f"{self.hub.url}/{repo}"})
            self.hub.commits[repo] = [(_revision(repo, 0), {".gitattributes": b"*.safetensors filter=lfs\n"})]
            self.hub.private[repo] = wanted.get("visibility") == "private"
            self.send_json(200, {"url": f"{self.hub.url}/{repo}"})
        elif path == "/api/validate-yaml":
            self.send_json(200, {"errors": [], "warnings": []})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", path):
            there = self.hub.files(found[1], found[2])
            if there is None:
                return self.send_missing("RepoNotFound")
            self.send_json(200, {"files": [_mode(file["path"], there) for file in json.loads(body)["files"]]})
        elif re.fullmatch(r"/[^/]+/[^/]+\.git/info/lfs/objects/batch", path):
            self.send_json(
                200, {"transfer": "basic", "objects": [self.action(o) for o in json.loads(body)["objects"]]}
            )
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", path):
            self.commit(found[1], [json.loads(line) for line in body.splitlines()])
        else:
            self.send_json(404, {"error": f"no {path}"})
        return None

    def do_PUT(self) -> None:
        name, content = self.path.rpartition("/")[2], self.body()
        self.hub.uploads.append(name)
        if self.hub.hang_after is not None and len(self.hub.uploads) > self.hub.hang_after:
            self.hub.hangs.set()
            self.hub.released.wait()
            self.close_connection = True
            return
        assert hashlib.sha256(content).hexdigest() == name
        self.hub.stored[name] = content
        self.send_json(200, {})

    def body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def action(self, wanted: dict) -> dict:
        """What the client is to do with a large file: nothing, if its content is here."""
        if wanted["oid"] in self.hub.stored:
            return wanted
        return {**wanted, "actions": {"upload": {"href": f"{self.hub.url}/upload/{wanted['oid']}"}}}

    def commit(self, repo: str, lines: list[dict]) -> None:
        if self.hub.refuse_commits:
            return self.send_json(403, {"error": self.hub.refuse_commits})
        files = dict(self.hub.files(repo) or {})
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        revision = _revision(repo, len(self.hub.commits[repo]))
        self.hub.commits[repo].append((revision, files))
        self.send_json(200, {"commitOid": revision, "commitUrl": f"{self.hub.url}/{repo}/commit/{revision}"})

    def send_info(self, repo: str, revision: str) -> None:
        files = self.hub.files(repo, revision)
        if files is None:
            return self.send_missing("RevisionNotFound" if repo in self.hub.commits else "RepoNotFound")
        siblings = [{"rfilename": name} for name in files]
        self.send_json(200, {"id": repo, "sha": self.revision(repo, revision), "siblings": siblings})

    def send_tree(self, repo: str, revision: str, folder: str) -> None:
        files = self.hub.files(repo, revision)
        if files is None:
            return self.send_missing("RevisionNotFound" if repo in self.hub.commits else "RepoNotFound")
        inside = {name: content for name, content in files.items() if name.startswith(f"{folder}/" if folder else "")}
        if folder and not inside:
            return self.send_missing("EntryNotFound")
        tree = [
            {"type": "file", "path": name, "size": len(content), "oid": _git_id(content)}
            for name, content in inside.items()
        ]
        self.send_json(200, tree)

    def send_file(self, repo: str, revision: str, name: str) -> None:
        files = self.hub.files(repo, revision)
        if files is None:
            return self.send_missing("RevisionNotFound" if repo in self.hub.commits else "RepoNotFound")
        if name not in files:
            return self.send_missing("EntryNotFound", **{"X-Repo-Commit": self.revision(repo, revision)})
        headers = {"X-Repo-Commit": self.revision(repo, revision), "ETag": f'"{_git_id(files[name])}"'}
        self.send(200, files[name], headers)

    def revision(self, repo: str, revision: str) -> str:
        return self.hub.commits[repo][-1][0] if revision == "main" else revision

    def send_missing(self, code: str, **headers: str) -> None:
        self.send(404, b"{}", {"X-Error-Code": code, **headers})

    def send_json(self, status: int, value) -> None:
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _mode(path: str, there: dict[str, bytes]) -> dict:
    is_large = path.endswith(".safetensors")
    # of a large file the Hub names the content's sha256, of a small one git's hash
    oid = (
        None if path not in there else (hashlib.sha256(there[path]).hexdigest() if is_large else _git_id(there[path]))
    )
    return {"path": path, "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False, "oid": oid}


def _git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _revision(repo: str, number: int) -> str:
    return hashlib.sha1(f"{repo} {number}".encode()).hexdigest()
