"""The choice of a repository against a fake listing, and every refusal against a Hub that runs in the test."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants, errors, hf_api

from lplr.errors import CheckpointError, HubError
from lplr.hf import hub

TOKEN = "hf_secretsecretsecretsecretsecret"
META = ["LICENSE.txt", "README.md", "checklist.chk", "consolidated.00.pth", "params.json", "tokenizer.model"]
HF = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin"]
LLAMA3 = ["config.json", "model-00001-of-00004.safetensors", "original/consolidated.00.pth", "tokenizer.json"]
REPOS = {
    "meta-llama/Llama-2-7b": META,
    "meta-llama/Llama-2-7b-hf": HF,
    "meta-llama/Llama-2-7b-chat": META,
    "meta-llama/Llama-2-7b-chat-hf": HF,
    "meta-llama/Meta-Llama-3-8B": LLAMA3,
    "old/pickled": ["config.json", "pytorch_model.bin"],
    "old/pickled-hf": ["config.json", "model.safetensors"],
    "old/alone": ["config.json", "pytorch_model-00001-of-00002.bin", "sub/model.safetensors"],
    "old/both": ["consolidated.00.pth"],
    "old/both-hf": ["pytorch_model.bin"],
    "new/mistral": ["consolidated.safetensors", "model-00001-of-00003.safetensors", "config.json"],
    "new/only-consolidated": ["consolidated.safetensors", "params.json"],
    "new/adapter": ["adapter_config.json", "adapter_model.safetensors"],
    "gguf/one": ["README.md", "m.Q4_K_M.gguf"],
    "gguf/two": ["m.Q8_0.gguf", "m.Q4_K_M.gguf"],
    "gguf/beside": ["m.gguf", "model.safetensors"],
    "empty/none": ["README.md"],
}


def listing(repo: str) -> list[str]:
    if repo not in REPOS:
        raise hub.RepositoryAbsent(f"{repo}: none")
    return REPOS[repo]


@pytest.mark.parametrize(
    "model, chosen",
    [
        ("meta-llama/Llama-2-7b", "meta-llama/Llama-2-7b-hf"),
        ("meta-llama/Llama-2-7b-chat", "meta-llama/Llama-2-7b-chat-hf"),
        ("meta-llama/Llama-2-7b-hf", None),
        ("meta-llama/Meta-Llama-3-8B", None),
        ("old/pickled", "old/pickled-hf"),
        ("new/mistral", None),
        ("gguf/one", "gguf/one:m.Q4_K_M.gguf"),
        ("gguf/beside", None),
    ],
)
def test_choose_repo(model: str, chosen: str | None):
    repo, notice = hub.choose_repo(model, listing)
    assert repo == (chosen or model)
    assert (notice is None) == (chosen is None)
    if notice and "gguf" not in model:
        assert model in notice and repo in notice
        assert "consolidated.00.pth" in notice or "pytorch_model.bin" in notice


@pytest.mark.parametrize(
    "model, phrase",
    [
        ("old/alone", "pytorch_model-00001-of-00002.bin and no model.safetensors.*convert"),
        ("old/both", "consolidated.00.pth and no model.safetensors"),
        ("new/only-consolidated", "consolidated.safetensors and no model.safetensors"),
        ("new/adapter", "PEFT adapter.*merge"),
        ("gguf/two", "2 GGUF files, give one as gguf/two:m.Q4_K_M.gguf .*m.Q8_0.gguf"),
        ("empty/none", "no weights"),
        ("nobody/nothing", "nobody/nothing"),
    ],
)
def test_choose_repo_refuses(model: str, phrase: str):
    with pytest.raises(HubError, match=phrase) as caught:
        hub.choose_repo(model, listing)
    assert "\n" not in str(caught.value)


def test_a_gated_sibling_is_told_not_hidden():
    def gated(repo: str) -> list[str]:
        if repo.endswith("-hf"):
            raise HubError("gated: accept its licence")
        return META

    with pytest.raises(HubError, match="accept its licence"):
        hub.choose_repo("meta-llama/Llama-2-7b", gated)


def test_local_paths_are_returned_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    (tmp_path / "owner/name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub.resolve(str(tmp_path)) == tmp_path
    assert hub.resolve("m.gguf") == Path("m.gguf")
    assert hub.resolve("owner/name") == Path("owner/name")  # a folder that is here wins over the Hub
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="folder that holds it"):
        hub.resolve("model.safetensors")


@pytest.mark.parametrize("path", ["./none", "../none", "/none/at/all", "~/none", "a/b/c", "none.gguf", "a/b.safetensors", ""])
def test_a_missing_path_is_not_looked_up_on_the_hub(path: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hub, "list_files", lambda *_: pytest.fail("asked the Hub"))
    with pytest.raises(CheckpointError, match="no such file or folder"):
        hub.resolve(path)


class FakeHub(ThreadingHTTPServer):
    """Speaks as much of the Hub's protocol as listing and downloading need."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.refusals: dict[str, tuple[int, dict[str, str]]] = {}
        self.served: list[str] = []


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def do_GET(self) -> None:  # the name that http.server looks for
        path = self.path.split("?")[0].strip("/")
        pieces = path.removeprefix("api/models/").split("/")
        repo, rest = "/".join(pieces[:2]), pieces[2:]
        if repo in self.server.refusals:
            status, headers = self.server.refusals[repo]
            return self.answer(status, b"", headers)
        files = self.server.repos.get(repo)
        if files is None:
            return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        if rest[:1] in (["tree"], ["revision"], ["resolve"]) and rest[1] not in ("main", "a" * 40):
            return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if not path.startswith("api/"):
            return self.file(files, "/".join(rest[2:]))
        if rest[:1] == ["tree"]:
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in files.items()
            ]
            return self.answer(200, json.dumps(tree).encode(), {})
        siblings = [{"rfilename": name} for name in files]
        info = {"id": repo, "modelId": repo, "sha": "a" * 40, "private": False, "tags": [], "downloads": 0, "likes": 0}
        return self.answer(200, json.dumps({**info, "siblings": siblings}).encode(), {})

    do_HEAD = do_GET

    def file(self, files: dict[str, bytes], name: str) -> None:
        if name not in files:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        self.server.served.append(name)
        etag = hashlib.sha1(files[name]).hexdigest()
        return self.answer(200, files[name], {"ETag": f'"{etag}"', "X-Repo-Commit": "a" * 40})

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the test output stays clean."""


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """A Hub on this machine, with an empty cache and no token."""
    server = FakeHub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    point(monkeypatch, f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def point(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(hf_api.api, "endpoint", endpoint)


def test_download_takes_safetensors_and_never_pickles(fake: FakeHub, caplog: pytest.LogCaptureFixture):
    names = [*HF, "tokenizer.json", "tokenizer.model", "special_tokens_map.json", "onnx/model.safetensors", "modeling.py"]
    fake.repos["meta-llama/Llama-2-7b"] = dict.fromkeys(META, b"original")
    fake.repos["meta-llama/Llama-2-7b-hf"] = {name: name.encode() for name in names}
    with caplog.at_level(logging.WARNING, logger="lplr"):
        folder = hub.resolve("meta-llama/Llama-2-7b")
    assert "reading its sibling meta-llama/Llama-2-7b-hf" in caplog.text
    wanted = set(names) - {"pytorch_model.bin", "onnx/model.safetensors", "modeling.py"}
    assert {f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()} == wanted
    assert (folder / "config.json").read_bytes() == b"config.json" and set(fake.served) == wanted


def test_gguf_of_a_repository(fake: FakeHub):
    fake.repos["gguf/one"] = {"m.Q4.gguf": b"GGUF4", "README.md": b""}
    fake.repos["gguf/two"] = {"m.Q4.gguf": b"GGUF4", "m.Q8.gguf": b"GGUF8"}
    notices: list[str] = []
    assert hub.resolve("gguf/one", notify=notices.append).read_bytes() == b"GGUF4"
    assert len(notices) == 1
    assert hub.resolve("gguf/two:m.Q8.gguf").read_bytes() == b"GGUF8"
    with pytest.raises(HubError, match="does not hold the file"):
        hub.resolve("gguf/two:m.Q9.gguf")


def test_what_was_downloaded_is_used_without_a_connection(fake: FakeHub, monkeypatch: pytest.MonkeyPatch):
    fake.repos["a/meta"] = {"consolidated.00.pth": b""}
    fake.repos["a/meta-hf"] = {"config.json": b"{}", "model.safetensors": b"w"}
    folder = hub.resolve("a/meta", notify=lambda _: None)
    point(monkeypatch, "http://127.0.0.1:9")  # the discard port: nothing listens
    notices: list[str] = []
    assert hub.resolve("a/meta", notify=notices.append) == folder
    assert "cannot be reached" in notices[0]
    with pytest.raises(HubError, match="cannot reach the Hub for a/other"):
        hub.resolve("a/other")


REFUSALS = {
    "gated": (403, {"X-Error-Code": "GatedRepo"}, "is gated: accept its licence at http.*a/gated"),
    "absent": (401, {"X-Error-Code": "RepoNotFound"}, "no such repository"),
    "token": (401, {"X-Error-Message": "Invalid credentials in Authorization header"}, "(refused|who asks).*hf auth login"),
    "scope": (403, {"X-Error-Message": "no"}, "forbids reading a/scope"),
    "busy": (429, {}, "limits the rate"),
    "teapot": (418, {}, "answered 418"),
    "disabled": (403, {"X-Error-Message": "Access to this resource is disabled."}, "forbids reading"),
}


@pytest.mark.parametrize("token", [None, TOKEN])
@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_of_the_hub(fake: FakeHub, monkeypatch: pytest.MonkeyPatch, case: str, token: str | None):
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    status, headers, phrase = REFUSALS[case]
    fake.refusals[f"a/{case}"] = (status, headers)
    with pytest.raises(HubError, match=phrase) as caught:
        hub.resolve(f"a/{case}")
    message = str(caught.value)
    assert "\n" not in message and TOKEN not in message and len(message) < 300
    if case == "gated":
        assert ("hf auth login" in message and "HF_TOKEN" in message) == (token is None)


def test_gated_only_at_download(fake: FakeHub, monkeypatch: pytest.MonkeyPatch):
    """The Hub lists the files of a gated repository to everyone and refuses the files themselves."""
    monkeypatch.setattr(hub, "list_files", lambda *_: HF)
    fake.refusals["meta-llama/Llama-2-7b-hf"] = (401, {"X-Error-Code": "GatedRepo"})
    with pytest.raises(HubError, match=r"accept its licence at .*/meta-llama/Llama-2-7b-hf.*hf auth login"):
        hub.resolve("meta-llama/Llama-2-7b-hf")


def test_repository_and_revision_that_are_not_there(fake: FakeHub):
    with pytest.raises(HubError, match="nobody/none: no such folder here and no such repository"):
        hub.resolve("nobody/none")
    fake.repos["a/b"] = {"model.safetensors": b""}
    with pytest.raises(HubError, match="a/b has no revision 'nope': choose"):
        hub.resolve("a/b", "nope")
    assert hub.resolve("a/b", "main").name == "a" * 40


def response(status: int) -> object:
    """A response of the HTTP library that huggingface_hub is built on."""
    module = __import__(errors.HfHubHTTPError.__bases__[0].__module__.split(".")[0])
    return module.Response(status, request=module.Request("GET", "http://localhost/a/b"))


def raising(error: BaseException) -> Callable[..., None]:
    def method(*_: object, **__: object) -> None:
        raise error

    return method


CLASSES = {
    "GatedRepoError": "is gated",
    "RepositoryNotFoundError": "no such repository",
    "RevisionNotFoundError": "has no revision 'v1'",
    "RemoteEntryNotFoundError": "does not hold",
    "DisabledRepoError": "forbids reading",
    "HfHubHTTPError": "forbids reading",
    "LocalEntryNotFoundError": "cannot reach",
    "OfflineModeIsEnabled": "cannot reach",
    "HFValidationError": "is not a Hub id",
}


@pytest.mark.parametrize("name", CLASSES)
def test_exception_classes_of_huggingface_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    kind = getattr(errors, name)
    text = f"many\nlines with {TOKEN}"
    error = kind(text, response=response(403)) if issubclass(kind, errors.HfHubHTTPError) else kind(text)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", raising(error))
    with pytest.raises(HubError, match=CLASSES[name]) as caught:
        hub.resolve("a/b", "v1")
    assert "\n" not in str(caught.value) and TOKEN not in str(caught.value)


@pytest.mark.parametrize("error", [ConnectionError("no"), TimeoutError("slow")])
def test_no_connection(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: OSError):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", raising(error))
    with pytest.raises(HubError, match=r"check the connection.*folder on this machine"):
        hub.resolve("a/b")


def test_disk_full_during_the_download(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hub, "list_files", lambda *_: HF)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", raising(OSError(28, "No space left on device")))
    with pytest.raises(HubError, match=r"No space left.*HF_HOME"):
        hub.resolve("a/b")
