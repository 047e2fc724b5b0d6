"""The identity of a run, and what its run.jsonl says is finished.

A run is resumed only under the same fingerprint: recipe, source, tokenizer, calibration text, versions.  A block counts as
finished only if its line stands in run.jsonl and its shard is there with the checksum that the line tells.  One process
at a time holds the folder, by a lock that the system gives back however that process ends.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from lplr import records
from lplr.errors import OutputError
from lplr.files import make_folder, sha256, sync_folder, truncate
from lplr.records import LEDGER, TIME_FIELDS
from lplr.stream.shards import Layout, write_shard

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FORMAT_VERSION = 2
_FIRST = ("recipe", "source", "files", "calibration")  # what the user set, before what follows from it


def fingerprint(header: dict[str, Any]) -> str:
    """SHA-256 of a `run` line, its times and its own fingerprint left out."""
    return digest([{k: v for k, v in header.items() if k != "fingerprint"}])


def digest(entries: list[dict[str, Any]]) -> str:
    """SHA-256 of ledger lines without their times: equal for two runs of one recipe."""
    plain = [{k: v for k, v in entry.items() if k not in TIME_FIELDS} for entry in entries]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def base_name(path: Path, model: str) -> str:
    """The name of the base model: a Hub id as given, else the folder's or file's own name, never a path."""
    return path.resolve().name if Path(model).expanduser().exists() else model


def identities(path: Path, files: Mapping[str, bytes]) -> dict[str, dict[str, Any]]:
    """SHA-256 of the source's small files, and whether they are copied; all of them change what a run makes."""
    out = {name: {"sha256": hashlib.sha256(content).hexdigest(), "copied": True} for name, content in files.items()}
    if path.is_dir() and (config := path / "config.json").is_file():
        out["config.json"] = {"sha256": hashlib.sha256(config.read_bytes()).hexdigest(), "copied": False}
    return out


class Ledger:
    """run.jsonl of one output folder, held by this process until `close` (or the end of a `with` block)."""

    def __init__(self, folder: Path, entries: list[dict[str, Any]], lock: int | None = None) -> None:
        self.folder = folder
        self.entries = entries
        self._lock = lock

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let other processes have the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

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
        """Add lines, durably, and remember them; OutputError when they cannot be written."""
        records.append(self.path, entries)
        self.entries.extend(entries)

    def commit(
        self, index: int, file: str, tensors: Mapping[str, Tensor], rows: list[dict[str, Any]], layout: Layout | None = None
    ) -> None:
        """Write a shard, then its lines, `rows` and that of the block: in this order, so that a line never speaks of bytes that
        are not there.
        """
        path = self.folder / file
        layout = layout or {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
        line = {"kind": "block", "index": index, "file": file, "sha256": write_shard(path, tensors, layout=layout)}
        line["bytes"] = path.stat().st_size
        line["tensor_bytes"] = sum(prod(shape) * dtype.itemsize for shape, dtype in layout.values())
        self.append([*rows, line])

    def check_files(self) -> None:
        """Compare what is finished with its lines; OutputError names a file that is missing or was altered."""
        told = {line["file"]: line for line in self.blocks.values()}
        if self.done is not None:
            told = self.done["files"]
        for name, line in told.items():
            path = self.folder / name
            if not path.is_file():
                raise OutputError(f"{path} is missing though {LEDGER} has it: delete the folder and compress again")
            # a finished folder may be large and is not written to again: `lplr verify` reads it all
            same = path.stat().st_size == line["bytes"] and (self.done is not None or sha256(path) == line["sha256"])
            if not same:
                raise OutputError(f"{path} is not what {LEDGER} says was written: delete the folder and compress again")


def check_folder(folder: Path, *, resume: bool = True) -> None:
    """OutputError for a folder that no run can use, before anything is downloaded or computed."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file: give an output folder")
    if (folder / LEDGER).is_file():
        if not resume:
            raise OutputError(f"{folder} holds a run already: drop --no-resume to go on with it, or give another folder")
        return
    found = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    if found:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise OutputError(f"{folder} is not empty ({found[0]}{more}) and holds no run of lplr: give an empty or new folder")


def open_ledger(folder: Path, header: dict[str, Any], *, resume: bool = True) -> Ledger:
    """The ledger of `folder` for the run that `header` describes: a new one, or that of the same run.

    Raises OutputError for a folder that holds anything else, naming the first field that differs, or that another
    process works on.
    """
    header = {"kind": "run", **header}
    header["fingerprint"] = fingerprint(header)
    check_folder(folder, resume=resume)
    try:
        make_folder(folder)
        lock = _locked(folder)
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror}: give a folder that you may write to") from error
    ledger = Ledger(folder, [], lock)
    try:
        check_folder(folder, resume=resume)  # again: it may have changed until the lock was had
        ledger.entries = _mended(ledger.path) if ledger.path.is_file() else []
        if not ledger.entries:
            ledger.append([header])
            sync_folder(folder)
        elif ledger.entries[0].get("fingerprint") != header["fingerprint"]:
            raise OutputError(
                f"{folder} holds another run: {_difference(ledger.entries[0], header)}: give another folder, "
                "or repeat the settings of that run to go on with it"
            )
        ledger.check_files()
    except BaseException:
        ledger.close()
        raise
    return ledger


def _locked(folder: Path) -> int | None:
    """A handle that locks the folder until it is closed; None where the system or the file system has no locks."""
    if fcntl is None:
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise OutputError(
            f"{folder} is in use by another lplr process: wait until it is done, or stop it and run again"
        ) from None
    except OSError:
        os.close(handle)
        return None
    return handle


def _mended(path: Path) -> list[dict[str, Any]]:
    """The lines up to the last one that closes something; what a crash left behind it is cut off the file.

    The records of a block stand before its `block` line: without that line they are of a block that will be made again.
    """
    entries = records.read(path)
    while entries and entries[-1]["kind"] in ("layer", "recovery"):
        entries.pop()
    raw = path.read_bytes()
    whole = sum(len(line) + 1 for line in raw.split(b"\n")[: len(entries)])
    if whole != len(raw):
        truncate(path, whole)
    records.check_files(path, entries)
    return entries


def _difference(old: dict[str, Any], new: dict[str, Any], where: str = "") -> str:
    """The first field in which two headers differ, with both values."""
    rest = sorted((set(old) | set(new)) - set(_FIRST) - set(TIME_FIELDS) - {"fingerprint"})
    for key in [*_FIRST, *rest]:
        before, after = old.get(key), new.get(key)
        if before == after:
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            return _difference(before, after, f"{where}{key}.")
        return f"{where}{key} was {_shown(before)}, now {_shown(after)}"
    return "its fingerprint differs"


def _shown(value: Any) -> str:
    """A value on a part of a line: checksums and long texts are cut."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:60]}..{text[-10:]}"
