"""A small Hugging Face Hub on this machine: the endpoints that huggingface_hub calls to make a repository, commit and download.

Candidates of the package index were judged first: hf-local-hub ships a client without its server, olah mirrors for reading only.
Spoken are repos/create, branch, preupload, git-lfs batch (basic transfer) with verify, commit (ndjson), revision, tree and
resolve, as the Hub documents them (its page on the API) and git-lfs does (docs/api/batch.md).  Xet storage is
not: clients set HF_HUB_DISABLE_XET=1.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from huggingface_hub import constants, hf_api

TOKEN = "hf_" + "localtokenlocaltokenlocal"
LARGE = (".safetensors", ".gguf", ".bin")


class Hub(ThreadingHTTPServer):
    """Repositories by name, each with branches and commits; large files by their SHA-256."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.private: dict[str, bool] = {}
        self.branches: dict[str, dict[str, str]] = {}
        self.commits: dict[str, dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}
        self.calls: list[str] = []
        self.stored: list[str] = []  # large files in the order in which they came
        self.stall_after: int | None = None  # a large file beyond so many waits for `go_on`
        self.stalled, self.go_on = threading.Event(), threading.Event()
        self.lock = threading.Lock()

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """What a branch or commit holds."""
        return self.commits[self.branches[repo].get(revision, revision)]

    def commit(self, repo: str, branch: str, files: dict[str, bytes]) -> str:
        oid = hashlib.sha1(repr((repo, branch, sorted(files.items()), len(self.commits))).encode()).hexdigest()
        self.commits[oid] = files
        self.branches[repo][branch] = oid
        return oid


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        pieces = self.pieces()
        if pieces[:2] == ["api", "models"]:
            return self.info("/".join(pieces[2:4]), pieces[4:])
        if len(pieces) > 4 and pieces[2] == "resolve":
            return self.resolve("/".join(pieces[:2]), pieces[3], "/".join(pieces[4:]))
        self.answer(404, {}, {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        pieces, body = self.pieces(), self.body()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {}, {"X-Error-Message": "Invalid credentials in Authorization header"})
        if pieces == ["api", "repos", "create"]:
            return self.create(json.loads(body))
        if pieces == ["api", "validate-yaml"]:
            return self.answer(200, {"errors": [], "warnings": []})
        if pieces[:1] == ["verify"]:
            told = json.loads(body)
            held = self.server.objects.get(told["oid"])
            return self.answer(200 if held is not None and len(held) == told["size"] else 404, {})
        if pieces[2:] == ["info", "lfs", "objects", "batch"]:
            return self.batch(json.loads(body))
        repo, rest = "/".join(pieces[2:4]), pieces[4:]
        if repo not in self.server.branches:
            return self.answer(404, {}, {"X-Error-Code": "RepoNotFound"})
        if rest[:1] == ["branch"]:
            known = rest[1] in self.server.branches[repo]
            if not known:
                self.server.commit(repo, rest[1], dict(self.server.files(repo)))
            return self.answer(409 if known else 200, {})
        if rest[1] not in self.server.branches[repo]:
            return self.answer(404, {}, {"X-Error-Code": "RevisionNotFound"})
        if rest[0] == "preupload":
            return self.preupload(repo, rest[1], json.loads(body)["files"])
        self.take_commit(repo, rest[1], [json.loads(line) for line in body.splitlines()])

    def do_PUT(self) -> None:
        """A large file."""
        server, oid, body = self.server, self.pieces()[1], self.body()
        with server.lock:
            late = server.stall_after is not None and len(server.stored) >= server.stall_after
        if late:
            server.stalled.set()
            server.go_on.wait()
            return self.answer(400, {})
        if hashlib.sha256(body).hexdigest() != oid:
            return self.answer(400, {})
        with server.lock:
            server.objects[oid] = body
            server.stored.append(oid)
        self.answer(200, {})

    def create(self, told: dict[str, Any]) -> None:
        repo = f"{told['organization']}/{told['name']}"
        url = {"url": f"{self.server.url}/{repo}"}
        if told["organization"] == "someone-else":
            return self.answer(403, {}, {"X-Error-Message": "You don't have the rights to create a model under the namespace"})
        if repo in self.server.branches:
            return self.answer(409, url)
        self.server.branches[repo], self.server.private[repo] = {}, told.get("visibility") == "private"
        self.server.commit(repo, "main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        self.answer(200, url)

    def preupload(self, repo: str, branch: str, asked: list[dict[str, Any]]) -> None:
        held = self.server.files(repo, branch)
        out = []
        for file in asked:
            name = file["path"]
            mode = "lfs" if name.endswith(LARGE) else "regular"
            entry = {"path": name, "uploadMode": mode, "shouldIgnore": False}
            if name in held:
                entry["oid"] = hashlib.sha256(held[name]).hexdigest() if mode == "lfs" else git_oid(held[name])
            out.append(entry)
        self.answer(200, {"files": out})

    def batch(self, told: dict[str, Any]) -> None:
        """What is still to be sent: an object that is here has no action."""
        out = []
        for file in told["objects"]:
            entry = {"oid": file["oid"], "size": file["size"], "authenticated": True}
            if file["oid"] not in self.server.objects:
                href = f"{self.server.url}/storage/{file['oid']}"
                entry["actions"] = {"upload": {"href": href}, "verify": {"href": f"{self.server.url}/verify"}}
            out.append(entry)
        self.answer(200, {"transfer": "basic", "objects": out})

    def take_commit(self, repo: str, branch: str, lines: list[dict[str, Any]]) -> None:
        files = dict(self.server.files(repo, branch))
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif value["oid"] in self.server.objects:
                files[value["path"]] = self.server.objects[value["oid"]]
            else:
                return self.answer(400, {"error": f"no object {value['oid']}"})
        oid = self.server.commit(repo, branch, files)
        self.answer(200, {"commitUrl": f"{self.server.url}/{repo}/commit/{oid}", "commitOid": oid, "success": True})

    def info(self, repo: str, rest: list[str]) -> None:
        revision = self.known(repo, rest[1] if len(rest) > 1 else "main")
        if revision is None:
            return None
        files = self.server.commits[revision]
        if rest[:1] == ["tree"]:
            return self.answer(200, [self.entry(name, data) for name, data in files.items()])
        facts = {"id": repo, "modelId": repo, "sha": revision, "private": self.server.private[repo], "tags": []}
        self.answer(200, {**facts, "downloads": 0, "likes": 0, "siblings": [{"rfilename": name} for name in files]})

    def entry(self, name: str, data: bytes) -> dict[str, Any]:
        found: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": git_oid(data)}
        if name.endswith(LARGE):
            found["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return found

    def resolve(self, repo: str, asked: str, name: str) -> None:
        revision = self.known(repo, asked)
        if revision is None:
            return None
        data = self.server.commits[revision].get(name)
        if data is None:
            return self.answer(404, {}, {"X-Error-Code": "EntryNotFound"})
        etag = hashlib.sha256(data).hexdigest() if name.endswith(LARGE) else git_oid(data)
        self.answer(200, data, {"ETag": f'"{etag}"', "X-Repo-Commit": revision, "Accept-Ranges": "bytes"})

    def known(self, repo: str, revision: str) -> str | None:
        """The commit of a branch or commit; None once a refusal is sent."""
        branches = self.server.branches.get(repo)
        if branches is None or (self.server.private[repo] and self.headers.get("Authorization") != f"Bearer {TOKEN}"):
            self.answer(401, {}, {"X-Error-Code": "RepoNotFound"})
            return None
        found = branches.get(revision, revision)
        if found not in self.server.commits:
            self.answer(404, {}, {"X-Error-Code": "RevisionNotFound"})
            return None
        return found

    def pieces(self) -> list[str]:
        path = self.path.split("?")[0].strip("/")
        with self.server.lock:
            self.server.calls.append(f"{self.command} {path}")
        return [unquote(piece) for piece in path.split("/")]

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the test output stays clean."""


def git_oid(data: bytes) -> str:
    """The name that git gives to a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def serving() -> Iterator[Hub]:
    """A Hub that runs until the block ends."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.go_on.set()
        hub.shutdown()
        hub.server_close()
        thread.join()


@contextmanager
def standing_in(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[Hub]:
    """A Hub that this process takes for the real one, with the right token; downloads go to the folder."""
    with serving() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(hf_api.api, "endpoint", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub
