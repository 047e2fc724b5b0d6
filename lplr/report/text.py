"""Numbers and settings as the pages show them; whatever cannot be shown is a dash."""

from __future__ import annotations

import json
import math
from typing import Any

DASH = "–"


def number(value: Any, digits: int = 4) -> str:
    """A number with so many significant digits and thousands separated; a dash for anything else."""
    found = finite(value)
    if found is None:
        return DASH
    if found and not 1e-4 <= abs(found) < 1e15:
        return f"{found:.{digits - 1}e}"
    places = 0 if found == int(found) else max(0, digits - 1 - math.floor(math.log10(abs(found))))
    return f"{found:,.{places}f}"


def with_error(value: Any, error: Any, digits: int = 4) -> str:
    """value ± error, the latter where there is one."""
    return number(value, digits) + ("" if finite(error) is None or finite(value) is None else f" ± {number(error, 2)}")


def percent(value: Any, places: int = 1) -> str:
    """A share as a percentage."""
    found = finite(value)
    return DASH if found is None else f"{100 * found:.{places}f} %"


def size(value: Any) -> str:
    """Bytes in units of 1000."""
    found = finite(value)
    if found is None:
        return DASH
    for unit in ("bytes", "kB", "MB", "GB"):
        if found < 1000:
            return f"{number(found)} {unit}"
        found /= 1000
    return f"{number(found)} TB"


def span(values: list[float]) -> str:
    """The least and the greatest value, or the only one."""
    low, high = number(min(values), 3), number(max(values), 3)
    return low if low == high else f"{low} to {high}"


def finite(value: Any) -> float | None:
    """The value if it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:  # JSON has whole numbers of any length
        return None
    return found if math.isfinite(found) else None


def show(value: Any) -> str:
    """A setting as text: strings as they are, numbers short, everything else as JSON."""
    if value is None or value == "":
        return DASH
    if isinstance(value, str):
        return value
    if finite(value) is not None:
        return f"{value:,.6g}" if isinstance(value, float) else number(value, 6)
    return json.dumps(value, ensure_ascii=False, default=str)
