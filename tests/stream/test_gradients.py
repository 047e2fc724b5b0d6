"""What the outputs' errors weigh, between the allocation and its block: kept as it was, measured again where it is lost."""

from __future__ import annotations

from pathlib import Path

import checkpoints
import pytest
import torch
from runs import calibrated, fingerprints, run, stopped, timeless

from lplr import records
from lplr.errors import OutputError
from lplr.recipe import make_recipe
from lplr.stream import gradients
from lplr.stream.checkpoint import open_checkpoint, plan_layers


def moments(n: int, scale: float) -> torch.Tensor:
    X = torch.randn(3 * n, n, generator=torch.Generator().manual_seed(n))
    return scale * X.T @ X / len(X)


def test_kept_moments_come_back_in_units_of_their_mean_diagonal(tmp_path: Path):
    given = {"a": moments(5, 1e-12), "b": moments(30, 1e9), "none": torch.zeros(4, 4)}
    told = gradients.keep(tmp_path, 7, given)
    assert gradients.intact(tmp_path, 7, told) and not gradients.intact(tmp_path, 7, told[::-1])
    back = gradients.kept(tmp_path, 7, told)
    assert set(back) == set(given) and not back["none"].any()
    for name in ("a", "b"):
        # float16: 11 bits
        torch.testing.assert_close(back[name], given[name] / given[name].diagonal().mean(), rtol=2.0**-11, atol=1e-6)
    gradients.drop(tmp_path, 7)
    gradients.drop(tmp_path, 7)
    assert not list(tmp_path.iterdir()) and not gradients.intact(tmp_path, 7, told)
    with pytest.raises(OutputError, match="missing or was altered"):
        gradients.kept(tmp_path, 7, told)


def test_the_largest_matrices_of_a_block_do_without_beyond_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = checkpoints.write(tmp_path / "base", "llama")
    checkpoint = open_checkpoint(str(source))

    def wanted(**changes: object) -> tuple[set[str], dict[str, int]]:
        plans = [p for p in plan_layers(checkpoint, make_recipe({"model": str(source), "bits": 3, **changes})) if p.block == 0]
        return gradients.wanted(plans), {p.name: p.shape[0] for p in plans}

    names, outputs = wanted()
    assert names == set(outputs)
    monkeypatch.setattr(gradients, "LIMIT", 4 * sum(sorted(n**2 for n in outputs.values())[:-1]))
    names, _ = wanted()
    assert len(names) == len(outputs) - 1 and max(outputs.values()) in {outputs[name] for name in set(outputs) - names}
    for other in ({"grid": "uniform"}, {"method": "caldera"}, {"method": "lplr"}):
        assert not wanted(**other)[0]


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob(".gradients-*"))


def test_lost_moments_are_measured_again_and_the_run_ends_the_same(tmp_path: Path):
    source = checkpoints.write(tmp_path / "base", "llama")
    chosen = calibrated(source)
    run(chosen, tmp_path / "whole")
    assert not files(tmp_path / "whole")
    stopped(chosen, tmp_path / "out")
    first, *others = files(tmp_path / "out")
    assert "00002" in first.name  # the one of the finished block is gone
    first.unlink()
    if others:
        others[0].write_bytes(b"another")
    run(chosen, tmp_path / "out")
    assert fingerprints(tmp_path / "out") == fingerprints(tmp_path / "whole")
    assert timeless(tmp_path / "out") == timeless(tmp_path / "whole")


def test_moments_that_cannot_be_measured_again_stop_the_run(tmp_path: Path):
    """Another machine's last digits: what is left of the run would not belong to what is there."""
    source = checkpoints.write(tmp_path / "base", "llama")
    stopped(calibrated(source), tmp_path / "out")
    entries = records.read(tmp_path / "out" / "run.jsonl")
    told = next(entry for entry in entries if entry["kind"] == "allocation")["gradients"]["1"]
    ledger = tmp_path / "out" / "run.jsonl"
    ledger.write_text(ledger.read_text().replace(told, "0" * len(told)))
    with pytest.raises(OutputError, match="files of the run were lost"):
        run(calibrated(source), tmp_path / "out")
