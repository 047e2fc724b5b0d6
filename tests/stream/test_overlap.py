"""What is read ahead and written behind is what would have been read and written; errors come out, threads end."""

from __future__ import annotations

import threading

import pytest
import torch

from lplr.stream.overlap import ReadAhead, WriteBehind


def numbered(name: str) -> torch.Tensor:
    return torch.tensor(float(name))


def test_names_in_order_are_read_before_they_are_asked_for():
    asked: list[str] = []
    second = threading.Event()

    def get(name: str) -> torch.Tensor:
        asked.append(name)
        if name == "2":
            second.set()
        return numbered(name)

    reader = ReadAhead(get, ["1", "2", "3"])
    assert float(reader("1")) == 1
    assert second.wait(10)  # nobody has asked for it
    assert [float(reader(name)) for name in ("2", "3")] == [2, 3]
    reader.close()
    assert asked == ["1", "2", "3"]


def test_names_out_of_order_are_read_all_the_same():
    reader = ReadAhead(numbered, ["1", "2", "3"])
    assert [float(reader(name)) for name in ("2", "1", "9", "3", "2", "3", "1")] == [2, 1, 9, 3, 2, 3, 1]
    reader.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("lplr-read")]


def test_a_read_that_fails_ahead_is_told_when_it_is_asked_for():
    reader = ReadAhead(numbered, ["1", "x", "3"])
    reader("1")
    with pytest.raises(ValueError, match="x"):
        reader("x")
    assert float(reader("3")) == 3
    reader.close()


def test_jobs_are_done_in_order_one_at_a_time_while_the_caller_goes_on():
    done: list[int] = []
    gate = threading.Event()
    with WriteBehind() as writer:
        writer.do(lambda: done.append(gate.wait(10)))
        assert done == []
        gate.set()
        for i in range(5):
            writer.do(lambda i=i: done.append(i))
        writer.wait()
        assert done == [True, 0, 1, 2, 3, 4]
    assert not [t for t in threading.enumerate() if t.name.startswith("lplr-write")]


def fail() -> None:
    raise OSError("full")


def test_a_job_that_fails_is_told_by_the_next_step():
    for step in (lambda w: w.wait(), lambda w: w.do(lambda: None)):
        with pytest.raises(OSError, match="full"), WriteBehind() as writer:
            writer.do(fail)
            step(writer)
    with pytest.raises(OSError, match="full"), WriteBehind() as writer:
        writer.do(fail)


def test_the_callers_own_error_comes_first_and_the_last_job_is_still_done():
    done: list[int] = []
    with pytest.raises(KeyError), WriteBehind() as writer:
        writer.do(lambda: done.append(1))
        raise KeyError
    assert done == [1]
