"""lplr.evaluate.run: several folders beside one base, resumed runs, provenance, what is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import runs
from typer.testing import CliRunner

from lplr import cli
from lplr.errors import CheckpointError, RecipeError
from lplr.evaluate.facts import model_facts
from lplr.evaluate.result import to_json
from lplr.evaluate.run import Wanted, evaluate_folder, evaluate_folders, protocol_text
from lplr.evaluate.speed import PROMPT, WRITTEN, measure_alone
from lplr.hf.load import load_model
from lplr.hf.text import Text
from lplr.report.comparison import JSON, PLOT, draw, write_comparison
from lplr.stream.verify import verify

FIELDS = ("seconds", "tokens_per_second", "started")


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LPLR_CACHE", str(tmp_path / "cache"))
    return checkpoints.write(tmp_path / "base", "llama", max_position_embeddings=256)


@pytest.fixture
def small(base: Path, tmp_path: Path) -> list[Path]:
    for bits in (2, 4):
        runs.run(runs.settings(base, bits=bits), tmp_path / f"{bits}bit")
    return [tmp_path / "2bit", tmp_path / "4bit"]


def wanted(base: Path, **changes: Any) -> Wanted:
    return Wanted(**{"dataset": str(base / "text.txt"), "seqlen": 64, "max_windows": 6, **changes})


def test_folders_beside_one_base(base: Path, small: list[Path], tmp_path: Path) -> None:
    steps: list[tuple[float, float, str]] = []
    found = evaluate_folders([str(p) for p in small], wanted(base), str(base), progress=lambda *s: steps.append(s))
    for path, r in zip(small, found, strict=True):
        assert r.model is not None and r.base is not None and r.certificate is not None
        assert r.model.kind == "lplr" and r.model.name == path.name and r.base.kind == "safetensors"
        done = json.loads((path / "run.jsonl").read_text().splitlines()[-1])
        assert r.model.bits_per_weight == done["bits_per_weight"] and r.model.sha256 == done["ledger_sha256"]
        assert r.model.bytes == sum(p.stat().st_size for p in path.glob("*.safetensors"))
        assert r.base.bits_per_weight == pytest.approx(32, rel=0.2) and "torch" in r.versions and r.machine and r.started
        assert json.loads((path / "eval-text.txt.json").read_text()) == r.model_dump(mode="json")
        verify(path)
        alone = evaluate_folder(str(path), wanted(base).dataset, str(base), seqlen=64, max_windows=6)
        assert alone.per_window == r.per_window
    assert (found[0].kl or 0) > (found[1].kl or 0) > 0
    assert steps[-1][0] == 2.0 and steps[-1][2].startswith("4bit, window 6")
    assert not list((tmp_path / "cache/eval").iterdir())


def test_a_killed_run_of_several_goes_on(base: Path, small: list[Path], tmp_path: Path) -> None:
    names = [str(p) for p in small]
    unbroken = evaluate_folders(names, wanted(base), str(base))

    def stop(done: float, total: float, what: str) -> None:
        if what.startswith("4bit, window 3"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate_folders(names, wanted(base), str(base), progress=stop)
    kept = {p.name: len(p.read_text().splitlines()) for p in (tmp_path / "cache/eval").iterdir()}
    assert sorted(kept.values()) == [4, 7]  # a line of facts, and the windows
    resumed = evaluate_folders(names, wanted(base), str(base))
    assert [r.model_copy(update=dict.fromkeys(FIELDS)) for r in resumed] == [
        r.model_copy(update=dict.fromkeys(FIELDS)) for r in unbroken
    ]
    assert not list((tmp_path / "cache/eval").iterdir())


def test_another_model_has_another_digest(base: Path, small: list[Path]) -> None:
    before = model_facts(base, load_model(base))
    assert model_facts(base, load_model(base)) == before
    checkpoints.change_tensor(base, "model.norm.weight", lambda t: t + 1)
    assert model_facts(base, load_model(base)).sha256 != before.sha256
    assert len({model_facts(p, load_model(p)).sha256 for p in small}) == 2


def test_speed_alone(base: Path, tmp_path: Path) -> None:
    found = measure_alone(base)
    assert found.reading > 0 and found.writing > 0 and found.peak_memory > found.idle_memory > 50e6
    assert (found.prompt, found.written, found.dtype) == (PROMPT, WRITTEN, "float32")
    with pytest.raises(CheckpointError, match="speed could not be measured"):
        measure_alone(tmp_path / "missing")


def test_settings_that_cannot_be(base: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra `eval`")
    with pytest.raises(RecipeError, match="limit is 0"):
        evaluate_folders([str(base)], wanted(base, tasks=("piqa",), limit=0))


def test_c4_is_read_as_the_papers_read_it() -> None:
    documents = [f"d{i}" for i in range(1200)]
    text, windows = protocol_text(Text.of("c4 (validation)", documents), None)
    assert text.joined == " ".join(documents[:1100]) and windows == 256
    assert protocol_text(Text.of("c4 (validation)", documents), 3)[1] == 3
    other = Text.of("c4_en_600.jsonl", documents)
    assert protocol_text(other, None) == (other, None)


def test_comparison(base: Path, small: list[Path], tmp_path: Path) -> None:
    texts = [to_json(r) for r in evaluate_folders([str(p) for p in small], wanted(base), str(base))]
    found = [json.loads(text) for text in texts]
    written = write_comparison(tmp_path / "a/b", texts)
    assert [p.name for p in written] == [JSON, PLOT]
    assert json.loads(written[0].read_text())["models"] == found
    svg = written[1].read_text()
    for word in ("2bit", "4bit", "base uncompressed", "stored bits per weight", "perplexity", "bits per weight, "):
        assert word in svg
    assert draw(found) == svg  # the same drawing from the same figures
    broken = [f | {"perplexity": None} for f in found]
    assert draw(broken) is None and [p.name for p in write_comparison(tmp_path / "c", [json.dumps(b) for b in broken])] == [JSON]


def test_the_command_on_several_models(base: Path, small: list[Path], tmp_path: Path) -> None:
    text = ["--dataset", str(base / "text.txt"), "--seqlen", "64", "--windows", "4", "--batch-size", "2"]
    arguments = ["eval", *map(str, small), "--against", str(base), *text, "-o", str(tmp_path / "both")]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 0, done.output
    for word in ("base", "2bit", "4bit", "perplexity", "ratio", "top-1", "4 windows of 64 tokens", "comparison.svg"):
        assert word in done.stdout
    assert [m["model"]["name"] for m in json.loads((tmp_path / "both" / JSON).read_text())["models"]] == ["2bit", "4bit"]


def test_a_damaged_model_is_told_of(base: Path, tmp_path: Path) -> None:
    checkpoints.change_tensor(base, "model.norm.weight", lambda t: t * float("nan"))
    text = ["--dataset", str(base / "text.txt"), "--seqlen", "64", "--windows", "2"]
    done = CliRunner().invoke(cli.app, ["eval", str(base), *text, "-o", str(tmp_path / "x")])
    assert done.exit_code == 0 and "a model is damaged" in done.stdout
    (found,) = json.loads((tmp_path / "x" / JSON).read_text())["models"]
    assert found["perplexity"] is None and found["per_window"]["nll"] == [None, None]
