"""A run goes on with as many threads as it began with, which its record tells: sums are cut up among threads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import checkpoints
import pytest
import torch
from runs import calibrated, fingerprints, run, settings, stopped, timeless

# large enough that torch shares out sums, products and factorizations among threads: it does from 2^15 entries on
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def first_line(out: Path) -> dict[str, object]:
    return json.loads((out / "run.jsonl").read_text().splitlines()[0])


@pytest.mark.parametrize("make", [settings, calibrated])
def test_a_run_that_goes_on_among_other_threads_has_the_same_bytes(make, tmp_path: Path):
    source = checkpoints.write(tmp_path / "base", "llama", **SIZES)
    chosen = make(source, method="lplr_svd", bits=2)
    torch.set_num_threads(2)
    run(chosen, tmp_path / "whole")
    stopped(chosen, tmp_path / "out")
    torch.set_num_threads(1)
    run(chosen, tmp_path / "out")
    assert torch.get_num_threads() == 1  # given back
    assert first_line(tmp_path / "out")["threads"] == 2
    assert fingerprints(tmp_path / "out") == fingerprints(tmp_path / "whole")
    assert timeless(tmp_path / "out") == timeless(tmp_path / "whole")


@pytest.mark.parametrize("told", [0, -1, 1 << 40, "2", None, 2.5])
def test_a_number_of_threads_that_cannot_be_is_not_taken_over(told: object, tmp_path: Path):
    source = checkpoints.write(tmp_path / "base", "llama")
    run(settings(source), tmp_path / "whole")
    stopped(settings(source), tmp_path / "out")
    ledger = tmp_path / "out" / "run.jsonl"
    lines = ledger.read_text().splitlines()
    ledger.write_text("\n".join([json.dumps({**json.loads(lines[0]), "threads": told}), *lines[1:]]) + "\n")
    run(settings(source), tmp_path / "out")
    assert fingerprints(tmp_path / "out") == fingerprints(tmp_path / "whole")
