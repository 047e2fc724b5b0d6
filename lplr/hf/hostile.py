"""What a file from outside may not do: ask for a model without end, or make another library fail in a way that nobody expects."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from lplr.errors import UnsupportedModel

MOST_MODULES = 1 << 17  # layers, or layers times experts; the largest models have some 20,000
# what transformers and the libraries below it raise over the content of a hostile file; RecursionError is a RuntimeError
FAULTS = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, AssertionError, MemoryError)
FAULTS += (StrictDataclassError,)
_COUNT = re.compile(r"layers?$|experts$|block_count$|expert_count$")  # fields that become a number of modules


def first_line(error: BaseException) -> str:
    """What an exception of another library says, on a part of a line."""
    return (str(error).strip() or type(error).__name__).split("\n")[0][:300]


def check_counts(file: Path, fields: Any) -> None:
    """UnsupportedModel when a config asks for more layers or experts than any model has, so that building it would not end.

    fields: the content of config.json or the metadata of a GGUF file, parts within parts too.
    """
    parts, counts = [fields], [1.0, 1.0]
    while parts:
        part = parts.pop()
        for key, value in part.items() if isinstance(part, Mapping) else ():
            if isinstance(value, Mapping):
                parts.append(value)
            elif isinstance(value, int | float) and _COUNT.search(str(key)):
                counts.append(value)
    if prod(sorted(counts)[-2:]) > MOST_MODULES:
        raise UnsupportedModel(
            f"{file} asks for {max(counts):,} layers or experts, which is more than a model has: do not use this checkpoint"
        )
