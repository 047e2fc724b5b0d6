"""Finished pieces of a measurement, one JSON line each, so that a killed run goes on with what is left.

    {"fingerprint": "..."}              everything that a piece depends on; another one starts a new file
    {"key": "...", "value": ...}        a piece

The files lie in $LPLR_CACHE/eval (~/.cache/lplr/eval) and are removed when the run is done: a result is never taken from an
earlier run.  A line that a kill has torn ends what is read.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from lplr.errors import OutputError


def work_file(*facts: object) -> tuple[Path, str]:
    """Where the pieces of a run with these facts (anything that JSON holds) are kept, and their fingerprint."""
    fingerprint = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    folder = Path(os.environ.get("LPLR_CACHE", "~/.cache/lplr")).expanduser() / "eval"
    return folder / f"{fingerprint[:24]}.jsonl", fingerprint


class Kept:
    """Values by key, in memory and, where a path is given, in its file."""

    def __init__(self, path: Path | None = None, fingerprint: str = "") -> None:
        """Read what the file has of this fingerprint.  Raises OutputError for a file that cannot be written."""
        self.path = path
        self._values: dict[str, Any] = {}
        if path is None:
            return
        self._values = _pieces(path, fingerprint)
        fresh = path.with_suffix(".part")
        lines = [{"fingerprint": fingerprint}, *({"key": k, "value": v} for k, v in self._values.items())]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
            fresh.replace(path)  # a kill before this line loses nothing
        except OSError as error:
            raise OutputError(f"{path} cannot be written ({error.strerror}): set LPLR_CACHE to a folder that can") from None

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def put(self, key: str, value: Any) -> None:
        """Keep one piece."""
        self._values[key] = value
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "value": value}) + "\n")

    def remove(self) -> None:
        """Delete the file: the run is done."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def _pieces(path: Path, fingerprint: str) -> dict[str, Any]:
    """Value of each key in the whole lines of a file of this fingerprint."""
    found: dict[str, Any] = {}
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        if json.loads(lines[0]) != {"fingerprint": fingerprint}:
            return found
        for line in lines[1:-1]:
            piece = json.loads(line)
            found[piece["key"]] = piece["value"]
    except (OSError, ValueError, KeyError, TypeError):
        return found
    return found
