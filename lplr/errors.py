"""Every exception that lplr raises on purpose.

    LplrError
    ├── RecipeError              a setting is unknown, out of range or contradictory
    ├── CheckpointError          an input checkpoint is missing, truncated or holds NaN / Inf
    │   └── UnsupportedModel     the architecture or a part of it cannot be compressed
    ├── HubError                 a repository is gated, absent, or cannot be reached
    ├── DatasetError             a calibration or evaluation text cannot be used
    ├── BackendError             a fast kernel that should run cannot
    ├── OutputError              the output folder belongs to another run, or cannot be written
    └── VerificationError        a compressed folder is incomplete, altered, or breaks its certificate

A message names the thing, what was expected and the remedy, on one line.  Trouble with the
numbers of a computation that can be told by its result is a field of that result, not an exception.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import TypeVar

T = TypeVar("T")


class LplrError(Exception):
    """Root of the tree; the command line prints it on one line and exits with status 2.

    Names in a message may come from a hostile file: what is not printable (line breaks, terminal codes) is shown escaped.
    """

    def __str__(self) -> str:
        said = super().__str__()
        return said if said.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in said)


class RecipeError(LplrError, ValueError):
    """A setting is unknown, out of range or contradicts another."""


class CheckpointError(LplrError):
    """An input checkpoint is missing, truncated, or holds values that are not finite."""


class UnsupportedModel(CheckpointError):
    """The architecture, or a part of it, cannot be compressed."""


class HubError(LplrError):
    """A repository of the Hugging Face Hub is gated, absent or cannot be reached."""


class DatasetError(LplrError):
    """A calibration or evaluation text is missing or empty."""


class BackendError(LplrError, RuntimeError):
    """The fast form of a kernel that should run on this device cannot be had."""


class OutputError(LplrError):
    """The output folder belongs to another run or cannot be written."""


class VerificationError(LplrError):
    """A compressed folder is incomplete, altered, or breaks its certificate."""


def choose(table: Mapping[str, T], name: str, what: str) -> T:
    """The entry of a literal table, or a RecipeError that lists the alternatives."""
    if name in table:
        return table[name]
    near = get_close_matches(name, table, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise RecipeError(f"unknown {what} {name!r}: choose one of {', '.join(table)}{hint}")
