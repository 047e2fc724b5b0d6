"""Matrices as tasks of a Ray cluster, `--engine ray`: the bytes of one process, the time of many machines.

The driver reads the checkpoint and writes shards and run.jsonl in order, so that the machines need no common disk.  A pass of the
calibration text through a block is a task a batch, which brings back second moments and outputs.  Each matrix is two
tasks, one that factorizes it and one that measures and bounds the error, which Ray runs where the first one left the weights.
What is lost with a worker or a machine, a task at work or a result that nobody has fetched, Ray makes again elsewhere, from what
the driver holds.  A finished block stands in run.jsonl and is not made again.

Every task computes with as many threads as the driver, since sums are cut up among them; OMP_NUM_THREADS=1 makes the most of many
processors.  A machine whose torch, lplr or vector instructions are not the driver's might give other bytes, and refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import version
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

import lplr
from lplr.errors import BackendError, LplrError, RecipeError
from lplr.factor import Factorization
from lplr.recipe import Recipe
from lplr.records import LayerRecord
from lplr.stream.checkpoint import LayerPlan
from lplr.stream.estimate import LIBRARIES, matrix_memory
from lplr.stream.matrix import Made, Seen, compress_matrix
from lplr.stream.workers import Begun, Pending, here, in_flight

T = TypeVar("T")

RETRIES = 3  # workers or machines that may die under one task before the run ends
AHEAD = 2  # matrices for each processor: one at work, one on its way


def _usable_ray(device: torch.device) -> Any:
    """The module `ray`; BackendError where it is not installed, RecipeError for a device that its tasks cannot use."""
    if device.type != "cpu":
        raise RecipeError(f"engine ray computes on processors, not on {device}: drop --device, or use --engine local")
    try:
        return import_module("ray")
    except ImportError:
        raise BackendError("engine ray needs the package ray: pip install 'lplr[ray]', on every machine") from None


class Cluster:
    """`stream.workers.Workers` that are processes of a Ray cluster: the one at RAY_ADDRESS, one that runs here, or a new one."""

    def __init__(self, device: torch.device) -> None:
        self._ray = ray = _usable_ray(device)
        self.device = device
        self._own = not ray.is_initialized()
        if self._own:
            try:
                ray.init(log_to_driver=False)
            except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
                raise BackendError(
                    f"no Ray cluster can be reached ({_line(error)}): check RAY_ADDRESS, or begin one with `ray start --head`"
                ) from error
        here = ray.get_runtime_context().get_node_id()
        nodes = [node for node in ray.nodes() if node["Alive"]]
        self._memory = max(node["Resources"].get("memory", 0.0) for node in nodes)
        self._store = next(node["Resources"].get("object_store_memory", 0.0) for node in nodes if node["NodeID"] == here)
        self._threads = torch.get_num_threads()
        each = min(self._threads, max(1, *(int(node["Resources"].get("CPU", 0)) for node in nodes)))
        self.slots = sum(int(node["Resources"].get("CPU", 0)) // each for node in nodes)
        self._task = ray.remote(num_cpus=each, max_retries=RETRIES)(_work)
        self._shared = WeakIdKeyDictionary()  # second moments that several matrices have in common -> their place in the store
        self._open: set[Any] = set()

    def ahead(self, largest: int) -> int:
        """As many as keep every processor busy and fit into the driver's part of the object store."""
        return max(1, min(AHEAD * self.slots, int(self._store) // max(largest, 1)))

    def submit(self, work: Callable[..., T], *args: Any) -> Pending[T]:
        """See Workers."""
        return self._job(self._task, getattr(work, "__name__", "work"), work, *args)

    def spread(
        self, work: Callable[..., T], common: Sequence[Any], parts: Iterable[Sequence[Any]], *, memory: int, what: str
    ) -> Iterator[T]:
        """See Workers; what is common is put into the object store once.  The driver does what no machine has the memory for."""
        if (needed := LIBRARIES + memory) > self._memory:
            return here(work, common, parts)
        task = self._task.options(memory=needed)
        handed = [self._ray.put(given) for given in common]
        return in_flight((self._job(task, what, work, *handed, *part) for part in parts), self.slots + 1)

    def _job(self, task: Any, what: str, work: Callable[..., T], *args: Any) -> Pending[T]:
        ref = task.remote(_machine(), self._threads, work, *args)
        self._open.add(ref)
        return _later(lambda: self._fetch(ref, what))

    def matrix(self, recipe: Recipe, p: LayerPlan, weight: Tensor, seen: Seen) -> Pending[Begun]:
        """See Workers; BackendError when no machine has the memory for it."""
        needed = LIBRARIES + matrix_memory(p.shape, moments=seen.H is not None)
        if needed > self._memory:
            raise BackendError(
                f"{p.name} ({p.shape[0]} x {p.shape[1]}) takes {needed / 2**30:.1f} GiB, the largest machine of the cluster has "
                f"{self._memory / 2**30:.1f}: add a larger one, or use --engine local"
            )
        sized = self._task.options(num_returns=2, memory=needed)
        moments = self._stored(seen.H), seen.G, self._stored(seen.step)
        f, rest = sized.remote(_machine(), self._threads, _factorized, recipe, p, weight, *moments, seen.note)
        record = self._task.options(memory=needed).remote(_machine(), self._threads, _recorded, rest)
        self._open |= {f, record}

        def begun() -> Begun:
            made = self._fetch(f, p.name)
            return Begun(made, _later(lambda: Made(made, self._fetch(record, p.name))))

        return _later(begun)

    def close(self) -> None:
        """Cancel what is not done; leave the cluster if it was joined here."""
        for ref in self._open:
            self._ray.cancel(ref, force=True)
        self._open.clear()
        if self._own:
            self._ray.shutdown()

    def _stored(self, tensor: Tensor | None) -> Any:
        """The tensor's place in the object store, where it is put once; None for None."""
        if tensor is None:
            return None
        if tensor not in self._shared:
            self._shared[tensor] = self._ray.put(tensor)
        return self._shared[tensor]

    def _fetch(self, ref: Any, what: str) -> Any:
        """The result of a task; what it raised, BackendError when the cluster has given it up."""
        errors = self._ray.exceptions
        try:
            return self._ray.get(ref)
        except errors.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, LplrError) else error) from None
        except errors.RayError as error:
            raise BackendError(
                f"{what}: the cluster has given it up after {RETRIES + 1} attempts ({_line(error)}): give its machines more "
                "memory or fewer processors (ray start --num-cpus), and run the same command again; finished blocks are kept"
            ) from error
        finally:
            self._open.discard(ref)


@dataclass(frozen=True)
class _Later(Generic[T]):
    """See Pending."""

    result: Callable[[], T]


def _later(get: Callable[[], T]) -> Pending[T]:
    """What `get` fetches when it is first asked for."""
    return _Later(cache(get))


def _work(driver: tuple[str, ...], threads: int, work: Callable[..., T], *args: Any) -> T:
    """In a worker: work(*args); BackendError on a machine that may give other bytes than the driver's."""
    if (here := _machine()) != driver:
        raise BackendError(
            f"a machine of the cluster has {', '.join(here)} where the driver has {', '.join(driver)}: its bytes may differ; "
            "install the same versions everywhere, and use machines of one kind"
        )
    torch.set_num_threads(threads)
    return work(*args)


def _machine() -> tuple[str, ...]:
    """What the bytes of a result depend on beside its inputs."""
    versions = f"lplr {lplr.__version__}", f"torch {torch.__version__}", f"numba {version('numba')}"
    return *versions, torch.backends.cpu.get_cpu_capability()


@torch.no_grad()
def _factorized(
    recipe: Recipe, p: LayerPlan, weight: Tensor, H: Tensor | None, G: Tensor | None, step: Tensor | None, note: str
) -> tuple[Factorization | None, Callable[[], Made]]:
    found = compress_matrix(recipe, p, weight, Seen(H, G, step, note), torch.device("cpu"))
    return found.f, found.certified


@torch.no_grad()
def _recorded(certified: Callable[[], Made]) -> LayerRecord:
    return certified().record


def _line(error: BaseException) -> str:
    """The first line of what an error says."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
