"""The file layer: files that appear whole or not at all, lines that reach the disk before the next step, and their checksums.

A file is written beside its place under a hidden name, flushed to the disk, and moved into place by a rename, which is made
durable by flushing the folder; a process that is killed, or a machine that loses power, at any moment leaves the old file, the
new one, or none.  Every step that changes a file is told to `observed`, so that tests can stop a run, or fail the disk, at each.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from lplr.errors import OutputError

Observer = Callable[[str, Path], None]  # (step, the file or folder that it changes)
# in the order of one file's life; `synced` and `renamed` come after their step, all others before it
STEPS = ("create", "write", "sync", "synced", "rename", "renamed", "sync folder", "folder synced")
STEPS += ("append", "truncate", "make", "remove")

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)
_observers: list[Observer] = []


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Call `observer` at every step (STEPS) of every file that is written in the context; what it raises ends the step."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


def _at(step: str, path: Path) -> None:
    for observer in _observers:
        observer(step, path)


class Writer:
    """A file that is being written; `write` takes bytes."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path = file, path

    def write(self, piece: bytes | memoryview) -> None:
        """Add a piece."""
        _at("write", self._path)
        self._file.write(piece)


@contextmanager
def _told(path: Path, size: int = 0) -> Iterator[None]:
    """What the system refuses to do in the block, as an OutputError."""
    try:
        yield
    except OSError as error:
        raise write_error(path, size, error) from error


@contextmanager
def replacing(path: Path, size: int) -> Iterator[Writer]:
    """A file of `size` bytes that takes the place of `path` when the block ends well, and leaves nothing when it does not.

    Raises OutputError when the disk is full or the folder cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")  # one name a target: a killed run's remains are overwritten
    try:
        with _told(path, size):
            _at("create", partial)
            with open(partial, "wb") as file:
                yield Writer(file, partial)
                _sync(file, partial)
            _at("rename", path)
            partial.replace(path)
            _at("renamed", path)
            sync_folder(path.parent)
    finally:
        with suppress(OSError):  # gone when all went well; a folder that cannot be written holds none
            partial.unlink(missing_ok=True)


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file in place of `path`; OutputError as for `replacing`."""
    with replacing(path, len(content)) as file:
        file.write(content)


def write_text_atomic(path: Path, text: str) -> None:
    """Write a UTF-8 text in place of `path`."""
    write_atomic(path, text.encode())


def append(path: Path, content: bytes) -> None:
    """Add bytes to a file, in one write that reaches the disk before this returns; OutputError as for `replacing`."""
    with _told(path, len(content)):
        _at("append", path)
        with open(path, "ab") as file:
            file.write(content)
            _sync(file, path)


def truncate(path: Path, size: int) -> None:
    """Cut a file, durably; OutputError as for `replacing`."""
    with _told(path):
        _at("truncate", path)
        with open(path, "r+b") as file:
            file.truncate(size)
            _sync(file, path)


def remove(path: Path) -> None:
    """Remove a file that may be there; a loss of power may bring it back.  OutputError as for `replacing`."""
    with _told(path):
        _at("remove", path)
        path.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, durably; one that is there is left as it is.  OutputError as for `replacing`."""
    if path.is_dir():
        return
    make_folder(path.parent)
    with _told(path):
        _at("make", path)
        path.mkdir(exist_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames, new names and removals in a folder durable; OutputError as for `replacing`."""
    with _told(folder):
        _at("sync folder", folder)
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        _at("folder synced", folder)


def _sync(file: BinaryIO, path: Path) -> None:
    file.flush()
    _at("sync", path)
    os.fsync(file.fileno())
    _at("synced", path)


def sha256(path: Path) -> str:
    """SHA-256 of a file, hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_error(path: Path, size: int, error: OSError) -> OutputError:
    """What could not be written, the space there is, what to do; on one line."""
    if error.errno in _FULL:
        free = shutil.disk_usage(path.parent).free
        return OutputError(
            f"cannot write {path} ({size:,} bytes): the disk or the quota is full, {free:,} bytes are free: "
            "make room, then run the same command again to go on"
        )
    if error.errno in _DENIED:
        return OutputError(f"cannot write {path}: {error.strerror}: give an output folder that you may write to")
    if error.errno == errno.ENOENT:
        return OutputError(f"cannot write {path}: the folder {path.parent} does not exist: create it or give another")
    return OutputError(f"cannot write {path}: {error.strerror or error}: give another output folder")
