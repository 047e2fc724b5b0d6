"""Bits given by sensitivity: never more than the budget in total, most where they matter, the same in every run of a recipe."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import checkpoints
import pytest
from runs import calibrated, fingerprints, run, settings, timeless

from lplr import records
from lplr.recipe import make_recipe
from lplr.records import LayerRecord
from lplr.stream.allocation import KIND, least_bits, taking_part
from lplr.stream.checkpoint import open_checkpoint, plan_layers
from lplr.stream.verify import verify


def line_of(folder: Path) -> dict[str, Any] | None:
    """The allocation as run.jsonl has it; it stands before every layer."""
    entries = records.read(folder / "run.jsonl")
    kinds = [entry["kind"] for entry in entries]
    assert kinds.count(KIND) <= 1 and (KIND not in kinds or kinds.index(KIND) == 1)
    return next((entry for entry in entries if entry["kind"] == KIND), None)


def share(rows: list[LayerRecord]) -> float:
    """Stored bits per weight of all rows together."""
    return sum(row.bits for row in rows) / sum(prod(row.shape) for row in rows)


def check(line: dict[str, Any], rows: list[LayerRecord], bits: float) -> None:
    """What holds of every allocation of `bits` to the matrices that `rows` tell of."""
    assert set(line["layers"]) == {row.name for row in rows}
    weights = sum(prod(row.shape) for row in rows)
    assert sum(entry["bits"] for entry in line["layers"].values()) <= bits * weights
    assert share(rows) <= bits
    # of very few bits `auto` makes factors, whose rank is whole: few ranks of a small matrix use little of what they may
    assert share(rows) > (0.99 if bits > 1.5 else 0.9) * bits
    for row in rows:
        entry = line["layers"][row.name]
        widths, losses = zip(*entry["curve"], strict=True)
        assert row.bits <= entry["bits"] + 1e-6 and row.stored == "compressed"
        assert widths[0] <= entry["bits"] <= widths[-1]
        # in columns of whole bytes two widths may take the same bits
        assert list(widths) == sorted(widths) and list(losses) == sorted(set(losses), reverse=True) and losses[-1] > 0
    assert line["predicted"] > 0 and line["slope"] >= 0


@pytest.mark.parametrize("bits", [1, 1.5, 2, 3.3, 4])
@pytest.mark.parametrize("architecture, text", [("llama", True), ("llama", False), ("gpt2", True), ("opt", False)])
def test_the_total_keeps_to_the_budget_and_uses_it(architecture: str, text: bool, bits: float, tmp_path: Path):
    source = checkpoints.write(tmp_path / "base", architecture)
    rows = run(given(source, bits) if text else {**settings(source), "bits": bits}, tmp_path / "out")
    line = line_of(tmp_path / "out")
    assert line and line["unit"] == ("nats a token" if text else "relative squared error")
    check(line, rows, bits)
    assert len({round(row.bits_per_weight, 2) for row in rows}) > 1
    verify(tmp_path / "out", str(source))


def given(source: Path, bits: float, **changes: Any) -> dict[str, Any]:
    return {**calibrated(source, **changes), "bits": bits}


@pytest.mark.parametrize("text", [True, False])
def test_matrices_with_a_rule_keep_their_own_bits_and_the_others_share_the_rest(text: bool, tmp_path: Path):
    source = checkpoints.write(tmp_path / "base", "mixtral")
    rules = [
        {"match": "*.v_proj", "bits": 5},
        {"match": "*.1.*down_proj", "rank": 3, "method": "lplr"},
        {"match": "*.o_proj", "method": "naive"},
        {"match": "*.2.*k_proj", "bits": 0.01},
    ]
    chosen = {**given(source, 2.5, rules=rules), **({} if text else {"dataset": "none"})}
    rows = {row.name: row for row in run(chosen, tmp_path / "out")}
    line = line_of(tmp_path / "out")
    own = {name for name in rows if name.endswith(("v_proj", "o_proj", "2.self_attn.k_proj")) or ".1." in name and "down" in name}
    assert line and set(line["layers"]) == set(rows) - own
    check(line, [row for name, row in rows.items() if name not in own], 2.5)
    for name in own:
        row = rows[name]
        if name.endswith("v_proj"):
            assert 4.5 < row.bits_per_weight <= 5
        elif name.endswith("k_proj"):
            assert row.stored == "dense"
        elif name.endswith("o_proj"):
            assert row.method == "naive" and row.bits_per_weight <= 2.5
        else:
            assert (row.method, row.rank) == ("lplr", 3)
    verify(tmp_path / "out", str(source))


def test_experts_that_no_token_reaches_are_given_the_least(tmp_path: Path):
    source = checkpoints.write(tmp_path / "base", "qwen2_moe")
    (source / "text.txt").write_text("w3 " * 400)
    rows = run(given(source, 2.5), tmp_path / "out")
    line = line_of(tmp_path / "out")
    assert line and share(rows) <= 2.5
    unseen = {row.name for row in rows if "no calibration token reached it" in row.note}
    assert unseen
    for name in unseen:
        entry = line["layers"][name]
        assert entry["bits"] == entry["curve"][0][0] and not any(loss for _, loss in entry["curve"])


@pytest.mark.parametrize(
    "change", [{"allocation": "uniform"}, {"method": "lplr"}, {"method": "naive"}, {"method": "double_binary"}, {"rank": 2}]
)
def test_where_nothing_is_allocated_no_line_says_so(change: dict[str, Any], tmp_path: Path):
    source = checkpoints.write(tmp_path / "base", "llama")
    chosen = {**settings(source), **change}
    rows = run(chosen, tmp_path / "out")
    assert line_of(tmp_path / "out") is None
    recipe = make_recipe(chosen)
    assert not taking_part(plan_layers(open_checkpoint(str(source)), recipe), recipe)
    assert "rank" in change or all(row.bits_per_weight <= recipe.bits for row in rows if row.stored == "compressed")


@pytest.mark.parametrize("text", [True, False])
def test_a_run_stopped_behind_its_allocation_goes_by_it(text: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = checkpoints.write(tmp_path / "base", "llama", shards=2)
    chosen = given(source, 2) if text else settings(source)
    run(chosen, tmp_path / "whole")

    def stop(done: float, total: float, text: str) -> None:
        if not text.startswith(("sensitivity", "error of", "bits are allocated")):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(chosen, tmp_path / "out", progress=stop)
    kept = (tmp_path / "out/run.jsonl").read_bytes()
    assert len(kept.splitlines()) == 2 and line_of(tmp_path / "out") == line_of(tmp_path / "whole") is not None
    assert not list((tmp_path / "out").glob("model-*"))
    with monkeypatch.context() as patch:
        patch.setattr("lplr.stream.compress.allocation", None)  # it would be measured again by calling this
        run(chosen, tmp_path / "out")
    assert (tmp_path / "out/run.jsonl").read_bytes().startswith(kept)
    assert fingerprints(tmp_path / "out") == fingerprints(tmp_path / "whole")
    assert timeless(tmp_path / "out") == timeless(tmp_path / "whole")


def test_a_run_stopped_before_its_allocation_measures_the_same_again(tmp_path: Path):
    source = checkpoints.write(tmp_path / "base", "gpt2")
    chosen = given(source, 2)

    def stop(done: float, total: float, text: str) -> None:
        if text.startswith("sensitivity: block 2 of 3, backward"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(chosen, tmp_path / "out", progress=stop)
    assert line_of(tmp_path / "out") is None
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["run.jsonl"]
    for folder in ("out", "again"):
        run(chosen, tmp_path / folder)
    assert line_of(tmp_path / "out") == line_of(tmp_path / "again") is not None
    assert fingerprints(tmp_path / "out") == fingerprints(tmp_path / "again")


def test_a_torn_allocation_line_is_made_again(tmp_path: Path):
    source = checkpoints.write(tmp_path / "base", "llama")
    run(settings(source), tmp_path / "whole")
    header, line, *_ = (tmp_path / "whole/run.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/run.jsonl").write_bytes(header + line[: len(line) // 2])
    run(settings(source), tmp_path / "out")
    assert timeless(tmp_path / "out") == timeless(tmp_path / "whole")
    assert fingerprints(tmp_path / "out") == fingerprints(tmp_path / "whole")


NAME = "model.layers.1.self_attn.o_proj"


def test_a_matrix_that_matters_a_hundred_times_as_much_gets_more_bits(tmp_path: Path):
    """The block adds W h to the residual stream: with W / 10 an equal relative error is a tenth as large, its loss 1/100."""
    lines = []
    for folder, factor in (("much", 1.0), ("little", 0.1)):
        source = checkpoints.write(tmp_path / folder / "base", "llama")
        checkpoints.change_tensor(source, f"{NAME}.weight", lambda W, factor=factor: W * factor)
        run(given(source, 2), tmp_path / folder / "out")
        lines.append(line_of(tmp_path / folder / "out"))
    much, little = ((line or {})["layers"][NAME] for line in lines)
    for (_, before), (_, after) in zip(much["curve"], little["curve"], strict=True):
        # a hundred, but that a smaller residual stream is more sensitive itself, behind a norm that scales it up again
        assert 10 < before / after < 100
    assert little["bits"] < much["bits"]


def test_scaling_that_a_successor_undoes_changes_no_allocation(tmp_path: Path):
    """up_proj * 4 and down_proj / 4 are the same function: the products of powers of two are exact, so are all curves."""
    lines = []
    for folder, factor in (("plain", 1.0), ("scaled", 4.0)):
        source = checkpoints.write(tmp_path / folder / "base", "llama")
        for name, by in (("up_proj", factor), ("down_proj", 1 / factor)):
            checkpoints.change_tensor(source, f"model.layers.1.mlp.{name}.weight", lambda W, by=by: W * by)
        run(given(source, 2), tmp_path / folder / "out")
        lines.append(line_of(tmp_path / folder / "out") or {})
    plain, scaled = lines
    assert scaled["predicted"] == pytest.approx(plain["predicted"], rel=1e-4)  # float32; ridges and scales are relative
    for name, entry in plain["layers"].items():
        assert scaled["layers"][name]["bits"] == entry["bits"]
        assert scaled["layers"][name]["curve"] == [pytest.approx(point, rel=1e-3) for point in entry["curve"]]


def test_a_budget_below_the_narrowest_widths_leaves_every_matrix_at_its_plan(tmp_path: Path):
    source = checkpoints.write(tmp_path / "base", "llama")
    rows = run({**settings(source), "bits": 0.6}, tmp_path / "out")
    compressed = [row for row in rows if row.stored == "compressed"]
    assert compressed and share(compressed) <= 0.6
    verify(tmp_path / "out", str(source))


def test_a_rule_that_names_the_bits_of_the_recipe_keeps_its_matrices_at_them(tmp_path: Path):
    source = checkpoints.write(tmp_path / "base", "llama")
    chosen = make_recipe({"model": str(source), "bits": 2, "rules": [{"match": "*.v_proj", "bits": 2}]})
    names = {p.name for p in taking_part(plan_layers(open_checkpoint(str(source)), chosen), chosen)}
    assert names and not any(name.endswith("v_proj") for name in names)


@pytest.mark.parametrize("budget, least", [(0.75, 0.25), (1, 0.5), (2, 1.5), (3, 2.5), (3.3, 2.8)])
def test_no_matrix_falls_far_below_the_budget(budget: float, least: float):
    assert least < least_bits(budget) < least + 0.5  # the next width of the trellis is half a bit wider
