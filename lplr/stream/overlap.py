"""What is done while something else is computed: the next matrix comes in, the last shard goes out, each in a thread."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from types import TracebackType

from torch import Tensor


class ReadAhead:
    """`get` of a source for names that are asked for in a known order, each read while the one before it is worked on.

    Costs the memory of one tensor more.  A name out of turn is read when it is asked for.
    """

    def __init__(self, get: Callable[[str], Tensor], order: Iterable[str]) -> None:
        self._get = get
        self._next = dict(pairwise(order))
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="lplr-read")
        self._ahead: tuple[str, Future[Tensor]] | None = None

    def __call__(self, name: str) -> Tensor:
        """The tensor; what reading it raised."""
        ahead, self._ahead = self._ahead, None
        tensor = ahead[1].result() if ahead is not None and ahead[0] == name else self._get(name)
        if name in self._next:
            self._ahead = self._next[name], self._pool.submit(self._get, self._next[name])
        return tensor

    def close(self) -> None:
        """End the thread; what it still reads is dropped."""
        self._ahead = None
        self._pool.shutdown(cancel_futures=True)


class WriteBehind:
    """Jobs done one after another in a thread, at most one of them waiting to end.

    A context that ends well raises what its last job raised; one that ends by an exception waits for that job and lets it be.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="lplr-write")
        self._job: Future[None] | None = None

    def __enter__(self) -> WriteBehind:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._pool.shutdown()

    def do(self, job: Callable[[], None]) -> None:
        """Begin a job when the one before it is done; raises what that one raised."""
        self.wait()
        self._job = self._pool.submit(job)

    def wait(self) -> None:
        """Until nothing is left to do; raises what the job raised."""
        job, self._job = self._job, None
        if job is not None:
            job.result()
