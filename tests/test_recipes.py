"""Every recipe of recipes/ is read, and its settings compress a pico model within their budget."""

from __future__ import annotations

from pathlib import Path

import checkpoints
import pytest

from lplr.recipe import load_recipe, make_recipe
from lplr.records import bits_per_weight, read
from lplr.stream.compress import compress
from lplr.stream.verify import verify

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))


def test_there_are_recipes() -> None:
    assert RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe(path: Path, tmp_path: Path) -> None:
    settings = load_recipe(path)
    wanted = make_recipe(settings)
    assert len(path.read_text().splitlines()) <= 25
    source = checkpoints.write(tmp_path / "base", "llama")
    small = {"model": str(source), "dataset": str(source / "text.txt"), "nsamples": 4, "seqlen": 32}
    recipe = make_recipe({**settings, **small})
    rows = compress(recipe, tmp_path / "out")
    budgets = {row.name: recipe.spec_for(row.name).bits_per_weight for row in rows}
    assert set(budgets.values()) <= {wanted.bits, *(rule.bits for rule in wanted.rules)}
    line = next((e for e in read(tmp_path / "out/run.jsonl") if e["kind"] == "allocation"), {"layers": {}})
    for row in rows:
        budget = budgets[row.name]
        assert budget is not None and (row.name not in line["layers"] or budget == wanted.bits)
        assert row.name in line["layers"] or row.stored == "dense" or row.bits_per_weight <= budget
    # the matrices without a rule share their bits, and use them but for the last of a column or a rank of these small ones
    assert 0.85 * wanted.bits < bits_per_weight(row for row in rows if budgets[row.name] == wanted.bits) <= wanted.bits
    assert verify(tmp_path / "out", str(source)).layers == len(rows)
