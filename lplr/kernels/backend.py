"""Which form of an op runs, chosen once, and how the compiled forms are compiled.

LPLR_BACKEND=reference in the environment asks for the plain torch forms everywhere (for tests).
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lplr.errors import BackendError


@cache
def compiled(op: str) -> ModuleType | None:
    """The module lplr.kernels.<op>.cpu; None where numba is absent or the reference is asked for."""
    if os.environ.get("LPLR_BACKEND") == "reference":
        return None
    try:
        return import_module(f"lplr.kernels.{op}.cpu")
    except ImportError:
        if op == "lowrank":  # said of one op, where it is felt most
            message = "numba cannot be imported, so compressed layers run as plain torch, many times slower: pip install numba"
            warnings.warn(message, RuntimeWarning, stacklevel=2)
        return None


@cache
def on_gpu(op: str) -> ModuleType | None:
    """The module lplr.kernels.<op>.gpu; None where the op has none or the reference is asked for, BackendError without triton."""
    name = f"lplr.kernels.{op}.gpu"
    if os.environ.get("LPLR_BACKEND") == "reference" or find_spec(name) is None:
        return None
    try:
        return import_module(name)
    except ImportError as error:
        raise BackendError(
            f"the GPU form of {op} needs triton ({error}): install lplr[gpu], or set LPLR_BACKEND=reference to run slowly"
        ) from None


def form(op: str, reference: ModuleType, x: Tensor) -> Any:
    """The module whose functions serve x: the compiled one of x's device, else the reference, which runs on any."""
    found = {"cpu": compiled, "cuda": on_gpu}.get(x.device.type)
    return (found(op) if found else None) or reference


def direct(x: Tensor, *others: Tensor | None) -> bool:
    """Whether a form may be called past torch's dispatcher, which costs more than a small product: nothing is compiled, traced,
    transformed or differentiated.
    """
    if torch.compiler.is_compiling() or not plain(x):
        return False
    return not (torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in (x, *others)))


def plain(x: Tensor) -> bool:
    """Whether the memory of x holds its numbers, and no mode of torch (tracing, fake tensors) or transform of torch.func has to
    see what is done to them.
    """
    internals: Any = torch._C  # what torch.utils and torch.func ask
    traced = internals._len_torch_dispatch_stack() or internals._functorch.peek_interpreter_stack() is not None
    return type(x) is Tensor and not x.is_neg() and not traced


def jit(*fastmath: str) -> Callable[[Callable[..., Any]], Any]:
    """A decorator: compile by numba with these relaxations of IEEE arithmetic, and keep it on disk where there is a place."""
    from numba import njit

    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": set(fastmath)}

    def decorate(function: Callable[..., Any]) -> Any:
        if function.__closure__:
            # numba tells such functions apart by a number that starts anew in each process: code kept by another process may
            # have the number of a different one, which is then linked in its place
            numbers = [cell.cell_contents for cell in function.__closure__]
            assert all(isinstance(number, int | np.number) for number in numbers), function
            function.__qualname__ += "_" + "_".join(f"{number:d}" for number in numbers)
        try:
            compiled: Any = njit(cache=True, **options)(function)
            compiled._cache._cache_file = _kept(compiled._cache._cache_file)
        except (RuntimeError, AttributeError, ImportError):  # no folder to write to, or a numba that keeps them otherwise
            return njit(**options)(function)
        return compiled

    return decorate


def _kept(numbas: Any) -> Any:
    """Where numba's cache of a function keeps what was compiled: a file for each key (signature, processor, code), with the key.

    numba's own form numbers the files in an index, and two processes that add to it at once give two keys the same number: the
    one then runs the code of the other.  It also looks at the file of a function alone, but code of other files is compiled
    into it: here a change of any source counts.
    """
    from numba.core.caching import IndexDataCacheFile

    class Kept(IndexDataCacheFile):
        def _place(self, key: Any) -> str:
            name = hashlib.sha256(repr((self._version, key)).encode()).hexdigest()[:16]
            return self._data_name_pattern.format(number=int(name, 16))

        def save(self, key: Any, data: Any) -> None:
            self._save_data(self._place(key), (self._source_stamp, key, data))

        def load(self, key: Any) -> Any:
            try:
                stamp, found, data = self._load_data(self._place(key))
            except Exception:  # noqa: BLE001  (absent, cut short, or of sources whose objects are no more: it is compiled again)
                return None
            return data if (stamp, found) == (self._source_stamp, key) else None

    place, base = numbas._cache_path, numbas._index_name.removesuffix(".nbi")
    return Kept(place, base, (numbas._source_stamp, _sources()))


@cache
def _sources() -> str:
    """A digest of the sources of every kernel."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
