"""What gives other bits with another number of threads, computed in one: factorizations of LAPACK, and sums of all entries.

Products of matrices, solves with a triangle, norms, and sums along rows or columns need no such care: each entry of their results
is summed up by one thread, in an order of its own (`tests/linalg/test_alone.py`).  So the bytes of a run do not depend on the
number of threads, nor on which machine of a cluster works with how many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")


@contextmanager
def one_thread() -> Iterator[None]:
    """Within it this thread computes alone; others go on as they did, but one that computes for the first time meanwhile
    takes the number over: give the threads of a pool theirs when they begin."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _alone(work: Callable[P, T]) -> Callable[P, T]:
    def alone(*args: P.args, **kwargs: P.kwargs) -> T:
        with one_thread():
            return work(*args, **kwargs)

    return alone


cholesky_ex = _alone(torch.linalg.cholesky_ex)
eigh = _alone(torch.linalg.eigh)
eigvalsh = _alone(torch.linalg.eigvalsh)
qr = _alone(torch.linalg.qr)
svd = _alone(torch.linalg.svd)
svdvals = _alone(torch.linalg.svdvals)
total: Callable[[Tensor], Tensor] = _alone(torch.sum)
mean: Callable[[Tensor], Tensor] = _alone(torch.mean)
