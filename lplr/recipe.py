"""What to do: QuantSpec, FactorSpec, Rule, Recipe.  Intent only: frozen, validated on reading, no tensors."""

from __future__ import annotations

import hashlib
import json
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lplr.errors import RecipeError

Rounding = Literal["nearest", "stochastic"]
Ranges = Literal["tensor", "row", "rank", "both"]
Sketch = Literal["gaussian", "srht", "sparse"]


class _Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class QuantSpec(_Spec):
    """One factor's grid: 2**bits equally spaced points on [-range, range].

    ranges: one for the whole factor (`tensor`), one a row or column of W (`row`: the rows of L, the columns of R),
    one a column of L and row of R (`rank`), or the product of the last two (`both`).  clip: the range is the largest magnitude (`max`), or the one of least
    mean squared error (`mse`).  Rounding is to the nearest point, or stochastic: dithered and unbiased.
    """

    bits: int = Field(2, ge=1, le=8)
    rounding: Rounding = "nearest"
    ranges: Ranges = "rank"
    clip: Literal["max", "mse"] = "mse"


class FactorSpec(_Spec):
    """How one matrix is factorized.  What is None is chosen from the shape and the budget by `factor.plan`.

    bits_per_weight is a budget for every stored bit; rank, l, r and q are obeyed where given.
    """

    method: str = "auto"
    bits_per_weight: float | None = Field(None, gt=0, le=16)
    rank: int | None = Field(None, ge=0)
    l: QuantSpec | None = None  # noqa: E741  (the papers' letter)
    r: QuantSpec | None = None
    q: QuantSpec | None = None
    sketch: Sketch = "gaussian"
    power_iterations: int = Field(0, ge=0, le=16)
    alternations: int = Field(0, ge=0, le=100)


class Rule(_Spec):
    """Settings for the matrices whose module name matches a shell pattern; the last rule that matches wins."""

    match: str
    bits: float | None = Field(None, gt=0, le=8)
    method: str | None = None
    rank: int | None = Field(None, ge=1)
    factor_bits: int | None = Field(None, ge=1, le=8)


class Recipe(_Spec):
    """One compression run.  Everything that changes a stored byte stands here, and nothing else.

    bits is the budget per weight of each compressed matrix, all overheads counted.  factor_bits None takes the
    width from the budget (`factor.rank.default_factor_bits`).  dataset: `builtin`, `none` (data-free), a text or jsonl
    file, or the name of a dataset of the Hub.
    """

    model: str
    bits: float = Field(1.0, gt=0, le=8)
    method: str = "auto"
    factor_bits: int | None = Field(None, ge=1, le=8)
    rank: int | None = Field(None, ge=1)
    sketch: Sketch = "gaussian"
    rounding: Rounding = "nearest"
    power_iterations: int = Field(2, ge=0, le=16)
    alternations: int = Field(4, ge=0, le=100)
    dataset: str = "builtin"
    nsamples: int = Field(128, ge=1)
    seqlen: int = Field(512, ge=8)
    seed: int = Field(0, ge=0, lt=1 << 63)
    modules_to_not_convert: tuple[str, ...] = ("lm_head", "embed_out", "score")
    rules: tuple[Rule, ...] = ()
    revision: str | None = None
    device: str = "cpu"
