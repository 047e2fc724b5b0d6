"""What to do: QuantSpec, FactorSpec, Rule, Recipe.  Intent only: frozen, validated on reading, no tensors."""

from __future__ import annotations

from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from lplr.errors import RecipeError

Rounding = Literal["nearest", "stochastic"]
Ranges = Literal["tensor", "row", "rank", "both"]
Allocation = Literal["sensitivity", "uniform"]
Sketch = Literal["gaussian", "srht", "sparse"]
Grid = Literal["uniform", "normal_float", "lattice", "trellis"]

USABLE = 2.0  # bits a weight below which no method's result is worth much without tuning
RECIPE_LIMIT = 1 << 20  # bytes of a recipe's file

# the widths in bits that each grid has, and every method; tests hold them equal to `kernels.levels.WIDTHS` and `factor.METHODS`
WIDTHS: dict[str, tuple[float, ...]] = {
    "uniform": (1, 2, 3, 4, 5, 6, 7, 8),
    "normal_float": (2, 3, 4),
    "lattice": (2, 3, 4),
    "trellis": (0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6),
}
METHOD_NAMES = ("lplr", "lplr_svd", "direct_svd", "lplr_feedback", "double_binary", "ldlq", "caldera", "naive")
LOW_RANK = METHOD_NAMES[:5]  # L R alone, without Q
ANY_GRID = LOW_RANK[:3]  # whose L and R may stand on any grid; the feedback of the other two knows the uniform one
# ranges of (L, R) that a method is given where the user does not say
FACTOR_RANGES: dict[str, tuple[Ranges, Ranges]] = {"lplr_feedback": ("row", "rank"), "double_binary": ("row", "both")}


class _Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class QuantSpec(_Spec):
    """One factor's grid: 2**bits equally spaced points on [-range, range], or another one of `kernels.levels`.

    ranges: one for the whole factor (`tensor`), one a row or column of W (`row`: the rows of L, the columns of R),
    one a column of L and row of R (`rank`), or the product of the last two (`both`).  clip: the range is the largest
    magnitude (`max`), or the one of least mean squared error (`mse`); a grid other than the uniform one has its best scale for
    a normal variable.  Rounding is to the nearest point, or, on the uniform grid, stochastic: dithered and unbiased.
    ValidationError (a ValueError) on a width that the grid does not have.
    """

    grid: Grid = "uniform"
    bits: float = Field(default=2, gt=0, le=8)
    rounding: Rounding = "nearest"
    ranges: Ranges = "rank"
    clip: Literal["max", "mse"] = "mse"

    @model_validator(mode="after")
    def _has_the_width(self) -> QuantSpec:
        if problem := _misfit(self.bits, self.rounding, self.grid):
            raise ValueError(problem)
        return self


class FactorSpec(_Spec):
    """How one matrix is factorized.  What is None is chosen from the shape and the budget by `factor.plan`.

    bits_per_weight is a budget for every stored bit; rank, l, r and q are obeyed where given.  grid is that of Q, or of L and R
    where there is no Q, if the plan chooses them.  The first q_narrow columns of Q have the next lower width of its grid.
    rotation and output_rotation are the seeds of the random rotations of the inputs and of the outputs in which a backbone
    stands, 0 for none.  rounding is that of the factors whose QuantSpec is chosen by the plan (stochastic: with the range that
    never saturates).
    """

    method: str = "auto"
    bits_per_weight: float | None = Field(default=None, gt=0, le=16)
    rank: int | None = Field(default=None, ge=0)
    grid: Grid | None = None
    l: QuantSpec | None = None
    r: QuantSpec | None = None
    q: QuantSpec | None = None
    q_narrow: int = Field(default=0, ge=0)
    rotation: int | None = Field(default=None, ge=0, lt=1 << 63)
    output_rotation: int | None = Field(default=None, ge=0, lt=1 << 63)
    rounding: Rounding = "nearest"
    sketch: Sketch = "gaussian"
    power_iterations: int = Field(default=0, ge=0, le=16)
    alternations: int = Field(default=0, ge=0, le=100)


class Rule(_Spec):
    """Settings for the matrices whose module name matches a shell pattern; the last rule that matches wins."""

    match: str
    bits: float | None = Field(default=None, gt=0, le=8)
    method: str | None = None
    grid: Grid | None = None
    rank: int | None = Field(default=None, ge=1)
    factor_bits: int | None = Field(default=None, ge=1, le=8)


Optimizer = Literal["adamw", "adamw_8bit"]


class Recovery(_Spec):
    """What is tuned after rounding, on the calibration text (`lplr.recover`).

    epochs: passes over the calibration rows for each block; 0: none.  distill_epochs: passes for the whole model, afterwards.
    lr: step size of the latents in units of their grid's points, with 0 codes stay as they are; a code changes when its latent
    has gone about half the way to another point.  scale_lr: that of norms and biases, and of the logarithms of scales.
    optimizer: torch's AdamW, or that of bitsandbytes with moments of 8 bits, which saves 6 of 28 bytes a weight where codes move.
    """

    epochs: int = Field(default=0, ge=0, le=1000)
    distill_epochs: int = Field(default=0, ge=0, le=1000)
    lr: float = Field(default=0.0, ge=0, le=1)
    scale_lr: float = Field(default=3e-3, ge=0, le=1)
    optimizer: Optimizer = "adamw"


Preset = Literal["fast", "balanced", "best"]
PRESETS: dict[str, Recovery] = {
    "fast": Recovery(),
    "balanced": Recovery(epochs=1, distill_epochs=2),
    "best": Recovery(epochs=4, distill_epochs=8),
}


def _preset(value: Any) -> Any:
    """The recovery that a preset's name stands for."""
    if isinstance(value, str):
        if value not in PRESETS:
            raise ValueError(f"no preset of that name: choose one of {', '.join(PRESETS)}, or give epochs and step sizes")
        return PRESETS[value]
    return value


class Recipe(_Spec):
    """One compression run.  Everything that changes a stored byte stands here, and nothing else.

    bits is the budget per weight of each compressed matrix, all overheads counted.  grid is that of the backbone, or of the
    factors of a method that has none; None takes it from the budget (`factor.plan`).  factor_bits None takes the width from
    the budget (`factor.rank.default_factor_bits`).  dataset: `builtin`, `none` (data-free), a text or jsonl
    file, or the name of a dataset of the Hub.  allocation: `sensitivity` gives bits where the loss minds their absence, within
    the budget of the whole model (`stream.allocation`); `uniform` gives every matrix the same.  propagation: the share of what
    compressed matrices do to the inputs of those behind them that these make up for (`stream.moments`); 0: none.  recovery: what
    is tuned after rounding, or the name of one of PRESETS.
    """

    model: str
    bits: float = Field(default=1.0, gt=0, le=8)
    allocation: Allocation = "sensitivity"
    method: str = "auto"
    grid: Grid | None = None
    factor_bits: int | None = Field(default=None, ge=1, le=8)
    rank: int | None = Field(default=None, ge=1)
    sketch: Sketch = "gaussian"
    rounding: Rounding = "nearest"
    power_iterations: int = Field(default=2, ge=0, le=16)
    alternations: int = Field(default=4, ge=0, le=100)
    dataset: str = "builtin"
    nsamples: int = Field(default=128, ge=1)
    seqlen: int = Field(default=512, ge=8)
    propagation: float = Field(default=0.5, ge=0, le=1)
    recovery: Annotated[Recovery, BeforeValidator(_preset)] = PRESETS["balanced"]
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    modules_to_not_convert: tuple[str, ...] = ("lm_head", "embed_out", "score")
    rules: tuple[Rule, ...] = ()
    revision: str | None = None
    device: str = "cpu"

    def spec_for(self, name: str) -> FactorSpec:
        """The FactorSpec of the matrix with this module name: the recipe's settings, then the last rule that matches."""
        matching = [rule for rule in self.rules if fnmatchcase(name, rule.match)]
        rule = matching[-1] if matching else Rule(match="*")
        method = rule.method or self.method
        grid = rule.grid or self.grid
        width = rule.factor_bits or self.factor_bits
        ranges = FACTOR_RANGES.get(method, ("rank", "rank"))
        own = grid if grid and method in ANY_GRID else "uniform"
        l, r = (None if width is None else quant_spec(width, self.rounding, own, which) for which in ranges)
        return FactorSpec(
            method=method,
            bits_per_weight=rule.bits or self.bits,
            rank=rule.rank or self.rank,
            grid=grid,
            l=l,
            r=r,
            rounding=self.rounding,
            sketch=self.sketch,
            power_iterations=self.power_iterations,
            alternations=self.alternations,
        )

    def untuned(self, calibrated: bool) -> str:
        """What the user should know of a result that is tuned by nothing after rounding; empty where there is nothing to say."""
        wanted = self.recovery.epochs or self.recovery.distill_epochs
        if wanted and calibrated:
            return ""
        needed = [] if calibrated else ["a calibration text, --dataset other than none"]
        needed += [] if wanted else ["`epochs` or `distill_epochs` in `recovery`, or --preset balanced"]
        remedy = f"recovery needs {' and '.join(needed)}"
        if self.bits < USABLE:
            return f"nothing is tuned, and below {USABLE:g} bits such a result is not usable, by any method: {remedy}"
        asked = "recovery" in self.model_fields_set and self.recovery != PRESETS["fast"]
        return f"nothing is tuned: {remedy}" if asked else ""

    def to_yaml(self) -> str:
        """The recipe as a YAML file that `load_recipe` reads back; settings at their default are left out, presets go by name."""
        settings = self.model_dump(mode="json", exclude_defaults=True)
        names = [name for name, meant in PRESETS.items() if meant == self.recovery]
        if names and "recovery" in settings:
            settings["recovery"] = names[0]
        return yaml.safe_dump(settings, sort_keys=False)


def quant_spec(bits: float, rounding: Rounding, grid: Grid = "uniform", ranges: Ranges = "rank") -> QuantSpec:
    """A factor's grid: nearest with the range of least error, or stochastic with the range that never saturates.

    Raises RecipeError on a width that the grid does not have, or on stochastic rounding to another than the uniform grid.
    """
    if problem := _misfit(bits, rounding, grid):
        raise RecipeError(problem)
    clip = "max" if rounding == "stochastic" else "mse"
    return QuantSpec(grid=grid, bits=bits, rounding=rounding, ranges=ranges, clip=clip)


def _misfit(bits: float, rounding: Rounding, grid: Grid) -> str:
    """What is wrong with a grid's width or rounding, and what to choose; empty if nothing is."""
    if bits not in WIDTHS[grid]:
        return f"the {grid} grid has no width of {bits:g} bits: choose one of {', '.join(f'{w:g}' for w in WIDTHS[grid])}"
    if grid != "uniform" and rounding == "stochastic":
        return f"stochastic rounding needs the uniform grid, not {grid}: choose one of the two"
    return ""


class _Loader(yaml.SafeLoader):
    """YAML of plain values without aliases: a few lines of these can stand for more values than a memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias (*name): write the value out")
        return super().compose_node(parent, index)


def load_recipe(path: Path) -> dict[str, Any]:
    """The settings of a YAML recipe; RecipeError names the file when it cannot be read or is no mapping."""
    try:
        with open(path, "rb") as file:
            text = file.read(RECIPE_LIMIT + 1)
        if len(text) > RECIPE_LIMIT:
            raise RecipeError(f"recipe {path} is longer than {RECIPE_LIMIT:,} bytes: give a recipe, a few lines of settings")
        settings = yaml.load(text.decode(), _Loader)  # a SafeLoader: plain values only
    except FileNotFoundError:
        raise RecipeError(f"recipe {path} does not exist: check the path; the folder recipes/ holds examples") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # ValueError: no UTF-8, no such date, too many digits
        reason = " ".join(str(error).split())
        raise RecipeError(f"recipe {path} cannot be read ({reason}): mend the YAML") from None
    if not isinstance(settings, dict):
        raise RecipeError(f"recipe {path} is not a mapping of settings: write lines such as `bits: 2`")
    return settings


def make_recipe(settings: dict[str, Any]) -> Recipe:
    """Validate settings; RecipeError names the path of the first wrong key, what is expected, and the nearest valid key."""
    try:
        return Recipe.model_validate(settings)
    except ValidationError as error:
        raise RecipeError(_explain(error.errors()[0])) from None


def _explain(problem: Any) -> str:
    """One line for one pydantic error."""
    place = ".".join(str(part) for part in problem["loc"])
    if problem["type"] in ("extra_forbidden", "invalid_key"):
        parts = {"rules": Rule, "recovery": Recovery}
        fields = next((parts[at] for at in problem["loc"][:-1] if at in parts), Recipe).model_fields
        near = get_close_matches(str(problem["loc"][-1]), fields, n=1, cutoff=0.0)
        return f"unknown setting {place!r}: did you mean {near[0]!r}? (valid: {', '.join(fields)})"
    if problem["type"] == "missing":
        return f"setting {place!r} is missing: add it"
    value = repr(problem["input"])
    value = value if len(value) <= 80 else f"{value[:80]}.."
    return f"setting {place!r} is {value}: {problem['msg'][0].lower()}{problem['msg'][1:]}"
