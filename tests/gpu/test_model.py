"""A model compressed on the GPU, calibrated and tuned, and run on both devices."""

from __future__ import annotations

from pathlib import Path

import checkpoints
import pytest
import torch
from runs import calibrated, run

import lplr

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("method, bits", [("auto", 2), ("auto", 1), ("double_binary", 1), ("lplr_feedback", 2), ("caldera", 3)])
def test_compressed_there_and_run_on_both(method: str, bits: float, tmp_path: Path) -> None:
    model = checkpoints.write(tmp_path / "model", hidden_size=64, intermediate_size=96, head_dim=16)
    chosen = calibrated(model, method=method) | {"bits": bits, "recovery": {"epochs": 1, "distill_epochs": 1}}
    here = run(chosen, tmp_path / "cpu")
    there = run(chosen | {"device": "cuda"}, tmp_path / "cuda")
    # other random numbers and other sums: other codes, as good on the whole
    mean = {device: sum(r.error for r in rows) / len(rows) for device, rows in (("cpu", here), ("cuda", there))}
    assert mean["cuda"] == pytest.approx(mean["cpu"], rel=0.1)
    loaded = lplr.load(tmp_path / "cuda")
    ids = torch.randint(4, 60, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = loaded(ids).logits
        logits = loaded.to("cuda")(ids.cuda()).logits.cpu()
    # float32 through three blocks
    assert float((logits - expected).norm() / expected.norm()) < 1e-3
