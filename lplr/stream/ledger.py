"""The identity of a run, and what its run.jsonl says is finished.

A run is resumed only under the same fingerprint: recipe, source, calibration text, versions.  A block counts as finished only
if its line stands in run.jsonl and its shard is there with the size that the line tells.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from lplr import records
from lplr.errors import OutputError
from lplr.records import LEDGER, TIME_FIELDS

FORMAT_VERSION = 1


def fingerprint(header: dict[str, Any]) -> str:
    """SHA-256 of a `run` line, its times and its own fingerprint left out."""
    return digest([{k: v for k, v in header.items() if k != "fingerprint"}])


def digest(entries: list[dict[str, Any]]) -> str:
    """SHA-256 of ledger lines without their times: equal for two runs of one recipe."""
    plain = [{k: v for k, v in entry.items() if k not in TIME_FIELDS} for entry in entries]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


class Ledger:
    """run.jsonl of one output folder."""

    def __init__(self, folder: Path, entries: list[dict[str, Any]]) -> None:
        self.folder = folder
        self.entries = entries

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / LEDGER

    @property
    def blocks(self) -> dict[int, dict[str, Any]]:
        """Index -> line of every finished shard."""
        return {entry["index"]: entry for entry in self.entries if entry["kind"] == "block"}

    @property
    def done(self) -> dict[str, Any] | None:
        """The last line of a finished run."""
        return next((entry for entry in self.entries if entry["kind"] == "done"), None)

    def append(self, entries: list[dict[str, Any]]) -> None:
        """Add lines, durably, and remember them."""
        records.append(self.path, entries)
        self.entries.extend(entries)


def open_ledger(folder: Path, header: dict[str, Any], *, resume: bool = True) -> Ledger:
    """The ledger of `folder` for the run that `header` describes: a new one, or that of the same run.

    Raises OutputError for a folder that holds anything else, naming the first field that differs.
    """
    path = folder / LEDGER
    header = {"kind": "run", **header}
    header["fingerprint"] = fingerprint(header)
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file: give an output folder")
    if not path.is_file():
        foreign = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
        if foreign:
            raise OutputError(f"{folder} is not empty ({foreign[0]}, ..) and no run of lplr: give an empty or new folder")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            ledger = Ledger(folder, [])
            ledger.append([header])
        except OSError as error:
            raise OutputError(f"cannot write {folder}: {error.strerror}: give a folder that you may write to") from None
        return ledger
    entries = _mended(path)
    if not entries:
        records.append(path, [header])
        return Ledger(folder, [header])
    if not resume:
        raise OutputError(f"{folder} holds a run already: drop --no-resume to go on with it, or give another folder")
    if entries[0].get("fingerprint") != header["fingerprint"]:
        raise OutputError(
            f"{folder} holds another run: {_difference(entries[0], header)}: give another folder, "
            "or repeat the settings of that run to go on with it"
        )
    return Ledger(folder, entries)


def _mended(path: Path) -> list[dict[str, Any]]:
    """The complete lines; a torn last line is cut off the file, so that the next line starts afresh."""
    entries = records.read(path)
    raw = path.read_bytes()
    whole = raw.rfind(b"\n") + 1
    if whole != len(raw):
        with open(path, "r+b") as file:
            file.truncate(whole)
    return entries


def _difference(old: dict[str, Any], new: dict[str, Any], where: str = "") -> str:
    """The first field in which two headers differ, with both values."""
    for key in sorted(set(old) | set(new)):
        if key in TIME_FIELDS or key == "fingerprint" or old.get(key) == new.get(key):
            continue
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            return _difference(before, after, f"{where}{key}.")
        return f"{where}{key} was {before!r}, now {after!r}"
    return "its fingerprint differs"
