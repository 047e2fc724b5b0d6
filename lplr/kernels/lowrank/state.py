"""Whether what was made of stored tensors is still theirs."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


def state(tensors: Iterable[Tensor | None]) -> list[int]:
    """How often each tensor was written to, which inference tensors do not say, and its address: memory moves without a new
    version when it is shared with another process.
    """
    there = [t for t in tensors if t is not None]
    return [t.data_ptr() for t in there] + [t._version for t in there if not t.is_inference()]
