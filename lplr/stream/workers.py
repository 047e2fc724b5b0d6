"""Who works on whole matrices, and on batches of the calibration text: this process, or a cluster (`stream.cluster`).

A matrix has a generator of its own and depends on nothing that was done before, so that it makes no difference to any byte who
works on it, or when.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from lplr import records
from lplr.errors import choose
from lplr.factor import Factorization
from lplr.recipe import Recipe
from lplr.records import LEDGER
from lplr.stream.checkpoint import LayerPlan
from lplr.stream.matrix import Made, Seen, compress_matrix

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
Spread = Callable[..., Iterator[Any]]  # `Workers.spread`

MOST_THREADS = 1024  # that a run.jsonl can ask for
AT_ONCE = 4  # matrices in work at a time: each holds a few float32 copies of itself


class Pending(Protocol[T_co]):
    """Work that was handed out."""

    def result(self) -> T_co:
        """What came of it, once it is done; raises what it raised."""
        ...


@dataclass(frozen=True)
class Begun:
    """A matrix that is factorized, f None where it stays dense; `made` comes when its error is measured and bounded."""

    f: Factorization | None
    made: Pending[Made]


class Workers(Protocol):
    """Who works.  slots: jobs that go on at a time."""

    device: torch.device
    slots: int

    def ahead(self, largest: int) -> int:
        """Matrices of at most `largest` bytes that may be in work at a time where none has to wait for another."""
        ...

    def submit(self, work: Callable[..., T], *args: Any) -> Pending[T]:
        """Do work(*args), a function of a module."""
        ...

    def spread(
        self, work: Callable[..., T], common: Sequence[Any], parts: Iterable[Sequence[Any]], *, memory: int, what: str
    ) -> Iterator[T]:
        """work(*common, *part), a function of a module, for every part, in order; each takes `memory` bytes beside the libraries.

        what: the work's name in an error.
        """
        ...

    def matrix(self, recipe: Recipe, p: LayerPlan, weight: Tensor, seen: Seen) -> Pending[Begun]:
        """Compress the tensor of a checkpoint: `stream.matrix.compress_matrix`."""
        ...

    def close(self) -> None:
        """Drop what nobody has begun."""
        ...


def here(
    work: Callable[..., T], common: Sequence[Any], parts: Iterable[Sequence[Any]], *, memory: int = 0, what: str = ""
) -> Iterator[T]:
    """`Workers.spread` one after the other in this process, with all of torch's threads for each."""
    return (work(*common, *part) for part in parts)


class Threads:
    """Threads of this process: the encoders of most grids run in one.  A GPU has enough to do with one matrix."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.slots = min(AT_ONCE, torch.get_num_threads()) if device.type == "cpu" else 1
        self._pool = ThreadPoolExecutor(self.slots, thread_name_prefix="lplr-matrix")

    def ahead(self, largest: int) -> int:
        """One: of a checkpoint of any size one matrix is in memory at a time."""
        return 1

    def submit(self, work: Callable[..., T], *args: Any) -> Pending[T]:
        """See Workers."""
        return self._pool.submit(work, *args)

    def spread(
        self, work: Callable[..., T], common: Sequence[Any], parts: Iterable[Sequence[Any]], *, memory: int, what: str
    ) -> Iterator[T]:
        """See Workers."""
        return here(work, common, parts, memory=memory, what=what)

    def matrix(self, recipe: Recipe, p: LayerPlan, weight: Tensor, seen: Seen) -> Pending[Begun]:
        """See Workers."""
        return self._pool.submit(self._matrix, recipe, p, weight, seen)

    @torch.no_grad()  # in any thread: the modes of torch are of one thread each
    def _matrix(self, recipe: Recipe, p: LayerPlan, weight: Tensor, seen: Seen) -> Begun:
        found = compress_matrix(recipe, p, weight, seen, self.device)
        return Begun(found.f, self._pool.submit(torch.no_grad()(found.certified)))

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(cancel_futures=True)


def _ray(device: torch.device) -> Workers:
    from lplr.stream.cluster import Cluster

    return Cluster(device)


ENGINES: dict[str, Callable[[torch.device], Workers]] = {"local": Threads, "ray": _ray}


def make_workers(engine: str, device: torch.device) -> Workers:
    """The workers of an engine; RecipeError for one that is not known, and what the engine itself raises."""
    return choose(ENGINES, engine, "engine")(device)


@contextmanager
def threads_of(folder: Path) -> Iterator[None]:
    """Within it, as many threads as the run that the folder holds began with: sums and factorizations are cut up among them."""
    before = torch.get_num_threads()
    header = next(iter(records.read(folder / LEDGER)), {}) if (folder / LEDGER).is_file() else {}
    told = header.get("threads")
    if isinstance(told, int) and 0 < told <= MOST_THREADS and told != before:
        torch.set_num_threads(told)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_flight(jobs: Iterable[Pending[T]], count: int) -> Iterator[T]:
    """The results, in order, of jobs that begin when they are drawn, at most `count` of them unfinished or not handed over."""
    waiting: deque[Pending[T]] = deque()
    for job in jobs:
        waiting.append(job)
        if len(waiting) >= count:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
