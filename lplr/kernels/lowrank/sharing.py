"""The threads that share a product on the CPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch

WORTH = 1 << 25  # entries of one bit by rows, some 0.3 ms: to share a product and wait for the other half costs up to 0.1 ms


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="lplr")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked process has none of its threads


def worth_threads(cost: int) -> bool:
    """Whether work of this cost, in entries of one bit by rows, is shared."""
    return cost >= WORTH and torch.get_num_threads() > 1


def shared(pieces: int, work: Callable[[int, int], None], cost: int) -> None:
    """work(first, last) on all pieces, in torch.get_num_threads() threads where there is enough of it; this one is the first."""
    threads = min(torch.get_num_threads(), pieces) if worth_threads(cost) else 1
    edges = [pieces * i // threads for i in range(threads + 1)]
    waiting = [_pool().submit(work, *pair) for pair in zip(edges[1:-1], edges[2:], strict=True)]
    work(edges[0], edges[1])
    for other in waiting:
        other.result()
