"""Recipes: every wrong setting is told by its path, with what is expected and the nearest right key."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from lplr.errors import RecipeError
from lplr.factor import METHODS
from lplr.kernels import levels
from lplr.recipe import (
    FACTOR_RANGES,
    METHOD_NAMES,
    PRESETS,
    WIDTHS,
    Grid,
    QuantSpec,
    Recipe,
    Rule,
    load_recipe,
    make_recipe,
    quant_spec,
)


@pytest.mark.parametrize("bits", [0, -1, 17, 8.01, float("nan"), float("inf"), "abc", None, [1]])
def test_bits_out_of_range(bits: Any):
    with pytest.raises(RecipeError, match=r"setting 'bits' is .*: input should be") as caught:
        make_recipe({"model": "m", "bits": bits})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"bitts": 1}, r"unknown setting 'bitts': did you mean 'bits'\? \(valid: model, bits"),
        ({"module_to_not_convert": []}, "did you mean 'modules_to_not_convert'"),
        ({"qqq": 1}, "unknown setting 'qqq': did you mean '"),
        ({"rules": [{"match": "*", "bit": 1}]}, r"unknown setting 'rules\.0\.bit': did you mean 'bits'\? \(valid: match"),
        ({"rules": [{"match": "*"}, {"bits": 1}]}, r"setting 'rules\.1\.match' is missing: add it"),
        ({"rules": [{"match": "*", "bits": 9}]}, r"setting 'rules\.0\.bits' is 9: input should be less than or equal to 8"),
        ({"rules": {"match": "*"}}, r"setting 'rules' is \{'match'"),
        ({"sketch": "gausian"}, "setting 'sketch' is 'gausian': input should be 'gaussian', 'srht' or 'sparse'"),
        ({"rounding": "up"}, "'nearest' or 'stochastic'"),
        ({"nsamples": 0}, "'nsamples' is 0"),
        ({"seqlen": 4}, "'seqlen' is 4"),
        ({"seed": -1}, "'seed' is -1"),
        ({"seed": 1 << 63}, "'seed' is"),
        ({"power_iterations": 2.5}, "'power_iterations' is 2.5"),
        ({"rank": 0}, "'rank' is 0"),
        ({"factor_bits": 9}, "'factor_bits' is 9"),
        ({"grid": "hexagonal"}, "'grid' is 'hexagonal': input should be 'uniform', 'normal_float', 'lattice' or 'trellis'"),
        ({"rules": [{"match": "*", "grid": 3}]}, r"setting 'rules\.0\.grid' is 3"),
        ({"model": None}, "'model' is None"),
        ({"modules_to_not_convert": "lm_head"}, "'modules_to_not_convert' is 'lm_head'"),
        ({3: 1}, "unknown setting '3'"),
        ({"method": "x" * 500 + "\n", "bits": "y" * 500}, r"setting 'bits' is 'y{79}\.\."),
    ],
)
def test_wrong_settings_are_told_by_their_path(settings: dict[Any, Any], named: str):
    with pytest.raises(RecipeError, match=named) as caught:
        make_recipe({"model": "m", **settings})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_the_recovery_it_stands_for(name: str):
    assert make_recipe({"model": "m", "recovery": name}).recovery == PRESETS[name]
    kept = yaml.safe_load(make_recipe({"model": "m", "recovery": name}).to_yaml())
    assert kept.get("recovery", "balanced") == name and ("recovery" in kept) == (name != "balanced")
    assert make_recipe(kept).recovery == PRESETS[name]


def test_what_is_tuned_by_nothing_says_what_it_is_worth():
    def said(calibrated: bool = True, **settings: Any) -> str:
        return make_recipe({"model": "m", **settings}).untuned(calibrated)

    assert said(bits=1) == said(bits=4) == said(bits=4, recovery="fast") == ""
    assert "below 2 bits such a result is not usable" in said(bits=1.9, recovery="fast")
    assert "--preset balanced" in said(bits=1, recovery="fast")
    assert said(bits=4, calibrated=False) == "" and "--dataset" in said(bits=1, calibrated=False)
    assert "--dataset" in said(bits=4, recovery="best", calibrated=False)  # who asks for it is told that nothing comes of it
    assert "`epochs`" in said(bits=4, recovery={"scale_lr": 0.001})
    both = said(bits=1, recovery="fast", calibrated=False)
    assert "--dataset" in both and "--preset balanced" in both


def test_a_wrong_recovery_is_told_by_its_path():
    with pytest.raises(RecipeError, match="'recovery' is 'slow'.*choose one of fast, balanced, best"):
        make_recipe({"model": "m", "recovery": "slow"})
    with pytest.raises(RecipeError, match=r"unknown setting 'recovery\.epoch': did you mean 'epochs'"):
        make_recipe({"model": "m", "recovery": {"epoch": 1}})
    with pytest.raises(RecipeError, match=r"'recovery\.lr' is -1"):
        make_recipe({"model": "m", "recovery": {"lr": -1}})


def test_without_a_model():
    with pytest.raises(RecipeError, match="setting 'model' is missing"):
        make_recipe({"bits": 1})


def test_the_last_rule_that_matches_wins():
    rules = (Rule(match="*_proj", bits=2), Rule(match="*.1.*", method="naive"), Rule(match="*.q_proj", bits=4, factor_bits=3))
    recipe = Recipe(model="m", bits=1, method="lplr", rank=7, rules=rules)
    q, up, other = (recipe.spec_for(f"model.layers.1.{name}") for name in ("q_proj", "up_proj", "gate"))
    assert (q.bits_per_weight, q.method, q.rank, q.l and q.l.bits) == (4, "lplr", 7, 3)
    assert (up.bits_per_weight, up.method) == (1, "naive")
    assert other.method == "naive"
    assert recipe.spec_for("model.layers.0.up_proj").bits_per_weight == 2
    assert recipe.spec_for("model.layers.0.gate") == Recipe(model="m", method="lplr", rank=7).spec_for("x")


def test_stochastic_rounding_takes_the_range_that_never_saturates():
    spec = Recipe(model="m", rounding="stochastic", factor_bits=2).spec_for("x")
    assert spec.l is not None and (spec.l.rounding, spec.l.clip) == ("stochastic", "max")
    nearest = Recipe(model="m", factor_bits=2).spec_for("x")
    assert nearest.r is not None and (nearest.r.rounding, nearest.r.clip) == ("nearest", "mse")


def test_yaml_round_trip(tmp_path: Path):
    recipe = Recipe(model="m", bits=1.5, rules=(Rule(match="*.q_proj", bits=2),), modules_to_not_convert=("a", "b"))
    (tmp_path / "r.yaml").write_text(recipe.to_yaml())
    assert make_recipe(load_recipe(tmp_path / "r.yaml")) == recipe


@pytest.mark.parametrize(
    "content, named",
    [
        (b"", "is not a mapping"),
        (b"- a\n- b\n", "is not a mapping"),
        (b"bits: [1\n", r"cannot be read \(.*\): mend the YAML"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"!!python/object/apply:os.system ['true']", "cannot be read"),
    ],
)
def test_yaml_that_cannot_be_used_names_the_file(content: bytes, named: str, tmp_path: Path):
    (tmp_path / "r.yaml").write_bytes(content)
    with pytest.raises(RecipeError, match=rf"r\.yaml .*{named}|r\.yaml {named}") as caught:
        load_recipe(tmp_path / "r.yaml")
    assert "\n" not in str(caught.value)


def test_a_recipe_that_is_not_there(tmp_path: Path):
    with pytest.raises(RecipeError, match=r"none\.yaml does not exist: check the path"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path)


def test_a_recipe_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Recipe(model="m").bits = 2


def test_the_tables_say_what_the_library_has():
    assert WIDTHS == levels.WIDTHS and get_args(Grid) == tuple(WIDTHS)
    assert tuple(METHODS) == METHOD_NAMES and set(FACTOR_RANGES) <= set(METHODS)


@pytest.mark.parametrize(("grid", "bits"), [("uniform", 1.5), ("lattice", 1), ("normal_float", 8), ("trellis", 7)])
def test_a_width_that_a_grid_does_not_have(grid: Any, bits: float):
    with pytest.raises(ValueError, match=rf"the {grid} grid has no width of {bits:g} bits: choose one of"):
        QuantSpec(grid=grid, bits=bits)
    with pytest.raises(RecipeError, match="choose one of"):
        quant_spec(bits, "nearest", grid)


def test_stochastic_rounding_needs_the_uniform_grid():
    with pytest.raises(ValueError, match="uniform grid, not trellis"):
        QuantSpec(grid="trellis", rounding="stochastic")
    with pytest.raises(RecipeError, match="uniform grid, not lattice"):
        Recipe(model="m", method="lplr", grid="lattice", factor_bits=2, rounding="stochastic").spec_for("x")


def test_the_grid_and_the_ranges_reach_the_spec():
    recipe = Recipe(model="m", grid="lattice", factor_bits=2, rules=(Rule(match="a", grid="trellis", method="lplr"),))
    plain, ruled = recipe.spec_for("x"), recipe.spec_for("a")
    assert (plain.grid, plain.l and plain.l.grid) == ("lattice", "uniform")
    assert (ruled.grid, ruled.l and ruled.l.grid, ruled.r and ruled.r.grid) == ("trellis", "trellis", "trellis")
    binary = Recipe(model="m", method="double_binary", factor_bits=1).spec_for("x")
    assert binary.l and binary.r and (binary.l.ranges, binary.r.ranges) == ("row", "both")
    with pytest.raises(RecipeError, match="no width of 5 bits"):
        Recipe(model="m", method="lplr", grid="lattice", factor_bits=5).spec_for("x")
