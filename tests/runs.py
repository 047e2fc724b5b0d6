"""Runs of the driver for its tests: settings, the run, what is compared of its folder."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from lplr import records
from lplr.errors import LplrError
from lplr.hf.load import load_model
from lplr.recipe import make_recipe
from lplr.records import TIME_FIELDS
from lplr.stream.compress import compress

FAST = {"dataset": "none", "alternations": 0, "power_iterations": 0, "bits": 4, "recovery": "fast"}


def settings(model: Path, **changes: Any) -> dict[str, Any]:
    return {"model": str(model), **FAST, **changes}


def calibrated(model: Path, **changes: Any) -> dict[str, Any]:
    return settings(model, dataset=str(model / "text.txt"), nsamples=6, seqlen=32, alternations=1, **changes)


def run(chosen: dict[str, Any], out: Path, **more: Any) -> list[records.LayerRecord]:
    return compress(make_recipe(chosen), out, **more)


def stopped(chosen: dict[str, Any], out: Path, after: int = 1, **more: Any) -> None:
    """A run that ends after some finished blocks."""

    def stop(done: float, total: float, text: str) -> None:
        if text.startswith(f"block {after} of"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(chosen, out, progress=stop, **more)
    assert not (out / "config.json").exists()


def layers_of(model: Any) -> dict[str, Any]:
    return {name: m.factorization for name, m in model.named_modules() if hasattr(m, "factorization")}


def fingerprints(folder: Path) -> dict[str, str]:
    """SHA-256 of every file but the ledger."""
    files = (p for p in folder.iterdir() if p.name != "run.jsonl")
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def timeless(folder: Path) -> list[dict[str, Any]]:
    """run.jsonl without its times."""
    return [{k: v for k, v in e.items() if k not in TIME_FIELDS} for e in records.read(folder / "run.jsonl")]


def no_model(folder: Path) -> None:
    assert not (folder / "config.json").exists()
    with pytest.raises(LplrError):
        load_model(folder)
