"""Work that is handed out comes back in order, a bounded part of it at a time; engines that cannot be had say so."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import checkpoints
import pytest
import torch
from runs import run, settings

from lplr.errors import BackendError, RecipeError
from lplr.stream.workers import Threads, in_flight, make_workers


class Counted:
    """Jobs that are told apart: how many have begun, and how many of these were not handed over at any time."""

    def __init__(self) -> None:
        self.begun, self.handed, self.most = 0, 0, 0

    def jobs(self, count: int) -> Iterator[Counted.Job]:
        for number in range(count):
            self.begun += 1
            self.most = max(self.most, self.begun - self.handed)
            yield Counted.Job(self, number)

    class Job:
        def __init__(self, owner: Counted, number: int) -> None:
            self.owner, self.number = owner, number

        def result(self) -> int:
            self.owner.handed += 1
            return self.number


@pytest.mark.parametrize("jobs", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("count", [1, 2, 3, 10])
def test_results_come_in_order_with_so_many_jobs_begun(jobs: int, count: int):
    counted = Counted()
    assert list(in_flight(counted.jobs(jobs), count)) == list(range(jobs))
    assert counted.most == min(jobs, count)


def test_no_job_begins_before_it_is_drawn():
    counted = Counted()
    results = in_flight(counted.jobs(9), 2)
    assert counted.begun == 0
    assert next(results) == 0 and counted.begun == 2
    assert next(results) == 1 and counted.begun == 3


def test_threads_hand_on_what_was_raised_and_end():
    workers = Threads(torch.device("cpu"))
    with pytest.raises(ZeroDivisionError):
        workers.submit(divmod, 1, 0).result()
    assert workers.submit(divmod, 7, 2).result() == (3, 1)
    workers.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("lplr-matrix")]


def test_an_engine_that_is_not_known_is_refused_before_anything_is_written(tmp_path: Path):
    source = checkpoints.write(tmp_path / "base", "llama")
    with pytest.raises(RecipeError, match=r"unknown engine 'rya': choose one of local, ray; did you mean 'ray'\?"):
        run(settings(source), tmp_path / "out", engine="rya")
    assert not (tmp_path / "out").exists()


def test_without_ray_its_engine_tells_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = checkpoints.write(tmp_path / "base", "llama")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BackendError, match=r"pip install 'lplr\[ray\]'"):
        run(settings(source), tmp_path / "out", engine="ray")
    assert not (tmp_path / "out").exists()


def test_the_cluster_has_no_graphics_cards():
    with pytest.raises(RecipeError, match="engine ray computes on processors, not on cuda: drop --device"):
        make_workers("ray", torch.device("cuda"))
