"""`lplr push` over real HTTP, each client in a process of its own, against a Hub on this machine."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import checkpoints
import hub_server
import pytest
import runs
import torch
import yaml
from typer.testing import CliRunner

from lplr import cli, records
from lplr.errors import HubError
from lplr.hf.load import load_model
from lplr.hf.push import check_secrets

# huggingface_hub's own: it hands files to its HTTP library by an argument that the library has renamed
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
ROOT = Path(__file__).resolve().parents[2]
COMMAND = "import sys; sys.argv[0] = 'lplr'; from lplr.cli import main; main()"
PLAIN = """
import sys, torch
from transformers import AutoModelForCausalLM
import lplr
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], revision=sys.argv[3])
with torch.no_grad():
    torch.save(model(torch.arange(3, 43)[None]).logits, sys.argv[2])
"""
WITHOUT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "lplr":
            raise ModuleNotFoundError("No module named 'lplr'", name="lplr")
sys.meta_path.insert(0, Absent())
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
"""
REMOTE = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
with torch.no_grad():
    torch.save(model(torch.arange(3, 43)[None]).logits, sys.argv[2])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("push")
    base = checkpoints.write(made / "base", "llama")
    (base / "README.md").write_text(
        "---\nlicense: other\nlicense_name: pico-1\nlicense_link: https://example.org/l\n---\n# base\n"
    )
    runs.run(runs.calibrated(base), made / "out")
    evaluation = {"dataset": "wiki|<b>text", "windows": 2, "seqlen": 32, "perplexity": 12.345, "calibration": {"name": "c4"}}
    (made / "out" / "eval-text.json").write_text(json.dumps(evaluation))
    return made / "out"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[hub_server.Hub]:
    """A Hub on this machine; this process writes to it with the right token."""
    with hub_server.standing_in(monkeypatch, tmp_path) as server:
        yield server


def call(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def environment(hub: hub_server.Hub, tmp_path: Path, token: str | None = hub_server.TOKEN) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    kept |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT)}
    kept |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1", "HF_DEBUG": "1"}
    return kept | ({"HF_TOKEN": token} if token else {})


def python(code: str, *arguments: object, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_model(folder)(torch.arange(3, 43)[None]).logits


def test_what_is_pushed_is_loaded_back_by_plain_transformers(folder: Path, hub: hub_server.Hub, tmp_path: Path):
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    env = environment(hub, tmp_path)
    done = python(COMMAND, "push", folder, "someone/pico", "--private", "--revision", "four", env=env)
    assert done.returncode == 0, done.stderr
    assert f"{hub.url}/someone/pico/commit/" in done.stdout
    assert "name paths of this machine" in " ".join(done.stderr.split())
    assert hub.private["someone/pico"] and set(hub.files("someone/pico")) == {".gitattributes"}
    sent = hub.files("someone/pico", "four")
    ledger = records.read(folder / "run.jsonl")
    wanted = {*ledger[-1]["files"], "run.jsonl", "README.md", "report.html", "eval-text.json", ".gitattributes"}
    assert set(sent) == wanted and {"modeling_lplr.py", "recipe.yaml", "tokenizer.json"} <= wanted
    assert all(sent[name] == (folder / name).read_bytes() for name in wanted - {"README.md", ".gitattributes"})
    assert all((folder / name).read_bytes() == content for name, content in before.items()), "the folder was changed"
    assert hub_server.TOKEN not in done.stdout + done.stderr
    assert not any(hub_server.TOKEN.encode() in content for content in sent.values())

    for code in (PLAIN, REMOTE):
        out = tmp_path / "logits.pt"
        out.unlink(missing_ok=True)
        loaded = python(code.replace("(sys.argv[1], t", "(sys.argv[1], revision='four', t"), "someone/pico", out, "four", env=env)
        assert loaded.returncode == 0, loaded.stderr
        assert torch.equal(torch.load(out), logits(folder))


def test_the_card_tells_what_was_measured(folder: Path, hub: hub_server.Hub):
    assert call("push", folder, "someone/pico").exit_code == 0
    card = hub.files("someone/pico")["README.md"].decode()
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "other" and front["license_name"] == "pico-1" and front["license_link"] == "https://example.org/l"
    assert "base_model" not in front  # a folder on someone's disk is no name on the Hub
    done = records.read(folder / "run.jsonl")[-1]
    assert f"{done['bits_per_weight']:.4f}" in card and 'from_pretrained("someone/pico")' in card
    assert "12.35" in card or "12.34" in card
    assert r"wiki\|\<b\>text" in card and "<b>" not in card
    assert sum(line.startswith("| model.layers") for line in card.splitlines()) == 21


def test_a_second_push_sends_nothing_again(folder: Path, hub: hub_server.Hub):
    assert call("push", folder, "someone/pico").exit_code == 0
    stored, commits = list(hub.stored), len(hub.commits)
    again = call("push", folder, "someone/pico")
    assert again.exit_code == 0, again.stderr
    assert hub.stored == stored and len(hub.commits) == commits


def test_an_upload_that_was_killed_goes_on(folder: Path, hub: hub_server.Hub, tmp_path: Path):
    env = environment(hub, tmp_path)
    hub.stall_after = 2
    process = subprocess.Popen([sys.executable, "-c", COMMAND, "push", str(folder), "someone/pico"], env=env)
    assert hub.stalled.wait(60)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert set(hub.files("someone/pico")) == {".gitattributes"}  # half of it is no model
    first = list(hub.stored)
    assert len(first) >= 2
    hub.stall_after = None
    hub.go_on.set()
    again = call("push", folder, "someone/pico")
    assert again.exit_code == 0, again.stderr
    shards = [p for p in folder.iterdir() if p.suffix == ".safetensors"]
    assert len(hub.stored) == len(set(hub.stored)) == len(shards) > len(first), "a file was sent twice, or not at all"
    sent = hub.files("someone/pico")
    assert all(sent[p.name] == p.read_bytes() for p in shards)


def test_a_refused_file_is_told_in_one_line(folder: Path, hub: hub_server.Hub):
    hub.stall_after = 1
    hub.go_on.set()  # a file beyond the first is refused at once
    done = call("push", folder, "someone/pico")
    assert done.exit_code == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "answered 400" in line and "run the same command again" in line and hub_server.TOKEN not in done.stderr


def test_compress_publishes(folder: Path, hub: hub_server.Hub, tmp_path: Path):
    options = ["--dataset", "none", "--alternations", "0", "--power-iterations", "0", "--bits", "4", "-o", tmp_path / "out"]
    done = call("compress", folder.parent / "base", *options, "--push-to-hub", "someone/made", "--private")
    assert done.exit_code == 0, done.stderr
    assert "config.json" in hub.files("someone/made") and hub.private["someone/made"]


@pytest.mark.parametrize(
    "repo, token, phrase",
    [
        ("someone/pico", None, "hf auth login"),
        ("someone/pico", "hf_wrong", "refused the token|who asks"),
        ("someone-else/pico", hub_server.TOKEN, "forbids writing|write access"),
        ("pico", hub_server.TOKEN, "give owner/name"),
        ("a/b/c", hub_server.TOKEN, "give owner/name"),
    ],
)
def test_refusals_come_before_the_work(
    folder: Path, hub: hub_server.Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repo: str, token: str | None, phrase: str
):
    monkeypatch.delenv("HF_TOKEN")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    done = call("compress", folder.parent / "base", "--dataset", "none", "-o", tmp_path / "out", "--push-to-hub", repo)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.exit_code == 2 and len(lines) == 1, done.stderr
    assert re.search(phrase, lines[0]) and (token is None or token not in lines[0])
    assert not (tmp_path / "out").exists()


def test_without_lplr_the_shim_fails_and_says_what_to_install(folder: Path, hub: hub_server.Hub, tmp_path: Path):
    env = environment(hub, tmp_path)
    assert call("push", folder, "someone/pico").exit_code == 0
    for model in ("someone/pico", folder):
        loaded = python(WITHOUT, model, env=env)
        assert loaded.returncode != 0
        assert "pip install lplr" in loaded.stderr.splitlines()[-1]


def test_a_damaged_folder_is_not_published(folder: Path, hub: hub_server.Hub, tmp_path: Path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "config.json").write_text("{}")
    done = call("push", copy, "someone/pico")
    assert done.exit_code == 2 and "config.json" in done.stderr and not hub.branches


def test_private_without_a_repository_is_a_slip(tmp_path: Path, folder: Path):
    done = call("compress", folder.parent / "base", "--dataset", "none", "-o", tmp_path / "out", "--private")
    assert done.exit_code == 2 and "--push-to-hub OWNER/NAME" in done.stderr and not (tmp_path / "out").exists()


def test_a_token_in_a_file_stops_the_push(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "recipe.yaml").write_text("model: x\n")
    monkeypatch.setenv("HF_TOKEN", "an-odd-token-of-mine")
    check_secrets(tmp_path)
    for secret in ("hf_" + "a" * 34, "an-odd-token-of-mine"):
        (tmp_path / "eval-x.json").write_text(json.dumps({"note": secret}))
        with pytest.raises(HubError, match="eval-x.json holds what looks like an access token") as caught:
            check_secrets(tmp_path)
        assert secret not in str(caught.value)
