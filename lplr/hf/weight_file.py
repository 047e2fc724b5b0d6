"""A file of weights on disk: how it is opened for reading, and what tells it from another one."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

from lplr.errors import CheckpointError

PROBES, PROBE_BYTES = 64, 4096
Stamp = tuple[int, int, int]  # size, time of the last change in ns, number of the file on its disk


@contextmanager
def reading(path: Path, stamp: Stamp | None = None) -> Iterator[FileIO]:
    """The file, open for reading without a buffer.

    stamp: what `stamp_of` told when the file was first read.  Raises CheckpointError when the file cannot be read, or when it is,
    before or after the block, not the one of the stamp.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            _check(path, file, stamp)
            yield file
            _check(path, file, stamp)
    except OSError as error:
        reason = error.strerror or str(error)
        raise CheckpointError(f"{path}: cannot be read ({reason}): check the disk and its permissions, then run again") from error


def stamp_of(file: FileIO) -> Stamp:
    """What changes when an open file is written to or replaced."""
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns, status.st_ino


def _check(path: Path, file: FileIO, stamp: Stamp | None) -> None:
    if stamp is None or (now := stamp_of(file)) == stamp:
        return
    if now[0] < stamp[0]:
        raise CheckpointError(f"{path}: shrank while it was read: download it again")
    raise CheckpointError(f"{path}: was changed while it was read: wait until it is complete, then run again")


def file_identity(path: Path, header_bytes: int) -> dict[str, Any]:
    """What tells this file from another without reading it whole, as JSON.

    bytes: its size; header: SHA-256 of its first header_bytes (names, types, shapes); sample: SHA-256 of 64 windows
    of 4 KiB spread evenly over the rest, so that other weights of the same layout (a fine-tuned sibling) are noticed.
    """
    size = path.stat().st_size
    sample = hashlib.sha256()
    with reading(path) as file:
        header = hashlib.sha256(file.read(header_bytes)).hexdigest()
        last = max(size - PROBE_BYTES, header_bytes)
        for k in range(PROBES):
            file.seek(header_bytes + (last - header_bytes) * k // (PROBES - 1))
            sample.update(file.read(PROBE_BYTES))
    return {"bytes": size, "header": header, "sample": sample.hexdigest()}
