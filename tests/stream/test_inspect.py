"""What inspect tells of an allocation: the curves between their points, what a folder holds, what would be measured."""

from __future__ import annotations

import math
from pathlib import Path

import checkpoints
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from runs import calibrated, run, settings, stopped

from lplr import records
from lplr.errors import OutputError, RecipeError
from lplr.recipe import make_recipe
from lplr.stream.checkpoint import open_checkpoint, plan_layers
from lplr.stream.inspect import SHOWN, is_compressed, loss_at, measured_losses, stored_losses


@given(
    steps=st.lists(st.tuples(st.floats(1, 1e6), st.floats(1e-6, 1)), min_size=1, max_size=8),
    where=st.floats(-0.2, 1.2),
)
def test_between_two_points_a_curve_is_linear_in_log_loss(steps: list[tuple[float, float]], where: float):
    widths, factors = zip(*steps, strict=True)
    bits, losses = np.cumsum(widths), 3 * np.cumprod(factors)
    x = float(bits[0] + where * (bits[-1] - bits[0]))
    found = loss_at(list(zip(bits.tolist(), losses.tolist(), strict=True)), x)
    if not bits[0] <= x <= bits[-1]:
        assert found is None
    else:
        # float64; a step of 1 bit in 8e6 leaves ten digits of the place between two points
        assert found == pytest.approx(math.exp(np.interp(x, bits, np.log(losses))), rel=1e-6)


def test_curves_of_nothing_of_one_point_and_of_zeros():
    assert loss_at([], 3.0) is None
    assert loss_at([(3.0, 0.5)], 3.0) == 0.5 and loss_at([(3.0, 0.5)], 3.1) is None
    # two widths that take the same bits
    twice = [(1.0, 1.0), (2.0, 0.5), (2.0, 0.25), (3.0, 0.1)]
    assert loss_at(twice, 2.0) == 0.25 and loss_at(twice, 1.5) == pytest.approx(0.5)
    zero = [(1.0, 0.0), (2.0, 0.0)]
    assert [loss_at(zero, b) for b in (1.0, 1.5, 2.0)] == [0.0, 0.0, 0.0]
    assert [loss_at([(1.0, 2.0), (2.0, 0.0)], b) for b in (1.0, 1.5, 2.0)] == [2.0, 0.0, 0.0]


def test_what_would_be_measured_is_what_the_run_notes(tmp_path: Path):
    source = checkpoints.write(tmp_path / "base", "mixtral")
    chosen = calibrated(source, rules=[{"match": "*.k_proj", "bits": 3}])
    rows = run(chosen, tmp_path / "out")
    assert is_compressed(str(tmp_path / "out")) and not is_compressed(str(source)) and not is_compressed("owner/name")
    told, checkpoint, recipe = stored_losses(tmp_path / "out"), open_checkpoint(str(source)), make_recipe(chosen)
    said: list[str] = []
    plans = plan_layers(checkpoint, recipe)
    found = measured_losses(checkpoint, plans, recipe, said.append, lambda share, text: said.append(text))
    assert any(text.startswith("sensitivity: block 1 of 3") for text in said)
    assert (found.unit, found.total, found.at) == (told.unit, told.total, told.at) and told.unit == "nats a token"
    assert [row.bits for row in told.rows] == [row.bits_per_weight for row in rows]
    shared = {row.name: row for row in told.rows if not row.name.endswith("k_proj")}
    assert set(shared) == {row.name for row in found.rows}
    for row in found.rows:  # what is stored is what was given, but for bits that no column can use
        assert row.at == shared[row.name].at and 0.9 * row.bits < shared[row.name].bits <= row.bits + 1e-9
    for row in told.rows:
        if row.name.endswith("k_proj"):
            assert row.loss is None and row.at == (None,) * len(SHOWN)
    line = next(e for e in records.read(tmp_path / "out/run.jsonl") if e["kind"] == "allocation")
    assert told.total == line["predicted"]
    assert found.at[2] is None or found.at[2] == pytest.approx(sum(row.at[2] or 0 for row in found.rows))


def test_folders_without_allocation_or_end(tmp_path: Path):
    source = checkpoints.write(tmp_path / "base", "llama")
    rows = run(settings(source, allocation="uniform"), tmp_path / "same")
    found = stored_losses(tmp_path / "same")
    assert found.unit is None and found.total is None and found.at == (None,) * len(SHOWN)
    assert [(r.name, r.bits) for r in found.rows] == [(r.name, r.bits_per_weight) for r in rows]
    stopped(settings(source), tmp_path / "broken")
    with pytest.raises(OutputError, match="is not finished"):
        stored_losses(tmp_path / "broken")


def test_methods_without_a_curve_are_refused(tmp_path: Path):
    source = checkpoints.write(tmp_path / "base", "llama")
    checkpoint, recipe = open_checkpoint(str(source)), make_recipe(settings(source, method="lplr"))
    with pytest.raises(RecipeError, match=r"'lplr' at 4 bits: raise --bits, or choose ldlq or caldera"):
        measured_losses(checkpoint, plan_layers(checkpoint, recipe), recipe, lambda _: None, lambda *_: None)
