"""The optimisation loop: never worse on held-out rows, the same steps for one seed, defined ends."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch
from torch import nn

from lplr.errors import BackendError
from lplr.hf.optimizers import optimizer_of
from lplr.recover import Course, Group, State, descend, relative_error
from lplr.recover.descend import step_size
from lplr.stream.distill import _read, _write

ROWS = [slice(i, i + 8) for i in range(0, 64, 8)]


def problem(noise: float = 0.0):
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(64, 5, generator=generator)
    w = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0])
    y = X @ w + noise * torch.randn(64, generator=generator)
    p = nn.Parameter(torch.zeros(5))
    return p, lambda made, rows: (X[rows] @ made["p"] - y[rows]).square().mean()


def of(p):
    """What is made of a parameter, through a function with a derivative of its own."""
    return lambda: {"p": 2 * p}


def gen():
    return torch.Generator().manual_seed(7)


def test_it_finds_a_least_squares_solution():
    p, loss = problem()
    course = descend([Group([p], 0.3)], of(p), loss, ROWS[:-1], ROWS[-1:], epochs=40, generator=gen())
    assert course.after < 1e-3 * course.before
    assert course.after == min(course.losses)
    assert course.steps == 40 * 7 and len(course.losses) == 40
    assert float(loss({"p": 2 * p.detach()}, ROWS[-1])) == pytest.approx(course.after, rel=1e-6)


def test_a_group_that_moves_once_in_some_steps_takes_the_gradients_of_all_of_them():
    """Beside AdamW by hand: a step behind every third slice by the sum of their gradients, and one at the end of an epoch."""
    p, loss = problem()
    other = nn.Parameter(torch.zeros(5))
    seen: list[torch.Tensor] = []

    def make():
        seen.append(p.detach().clone())
        return {"p": 2 * p + 0 * other}

    descend([Group([other], 0.1), Group([p], 0.1, 3)], make, loss, ROWS, ROWS[-1:], epochs=1, generator=gen())
    moved = [not torch.equal(a, b) for a, b in zip(seen[1:-1], seen[2:], strict=True)]  # the first made is for what is held out
    assert moved == [False, False, True, False, False, True, False, True]
    order = torch.randperm(len(ROWS), generator=gen()).tolist()
    q = nn.Parameter(torch.zeros(5))
    optimizer = torch.optim.AdamW([q], lr=0.1, betas=(0.9, 0.95), weight_decay=0.0)
    for i, k in enumerate(order):
        loss({"p": 2 * q}, ROWS[k]).backward()
        if i % 3 == 2 or i == len(order) - 1:
            optimizer.param_groups[0]["lr"] = 0.1 * step_size(i, len(order))
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(seen[-1], q.detach(), rtol=1e-6, atol=1e-7)


def test_a_step_size_that_destroys_leaves_the_start():
    p, loss = problem(noise=0.3)
    with torch.no_grad():
        p.copy_(torch.tensor([0.5, -1.0, 0.25, 0.0, 1.5]))
    start = p.detach().clone()
    course = descend([Group([p], 10.0)], of(p), loss, ROWS[:-1], ROWS[-1:], epochs=3, generator=gen())
    assert min(course.losses) > course.before
    assert course.after == course.before and torch.equal(p, start)


def test_a_loss_that_is_not_finite_ends_it_with_the_best():
    p, loss = problem()
    calls = []

    def bad(made, rows):
        calls.append(rows)
        return loss(made, rows) * (math.nan if len(calls) > 20 else 1.0)

    course = descend([Group([p], 0.1)], of(p), bad, ROWS[:-1], ROWS[-1:], epochs=9, generator=gen())
    assert math.isfinite(course.after) and bool(torch.isfinite(p).all())
    assert len(course.losses) < 9


def test_a_loss_that_is_not_finite_has_a_place_in_a_record():
    entry = Course(1.0, (0.5, math.inf), 0.5, 3, 0.1).entry()
    assert json.loads(json.dumps(entry, allow_nan=False)) == {**entry, "losses": [0.5, None]}
    assert Course(math.nan, (), math.nan, 0, 0.0).entry()["before"] is None


def test_not_a_number_at_the_start_changes_nothing():
    p, _ = problem()
    course = descend(
        [Group([p], 0.1)], of(p), lambda made, rows: made["p"].sum() * math.nan, ROWS, ROWS, epochs=2, generator=gen()
    )
    assert course.steps == 0 and not p.any()


def test_one_seed_one_course_and_nothing_without_epochs():
    ends = []
    for _ in range(2):
        p, loss = problem(0.3)
        descend([Group([p], 0.1)], of(p), loss, ROWS[:-1], ROWS[-1:], epochs=3, generator=gen())
        ends.append(p.detach())
    assert torch.equal(*ends)
    p, loss = problem()
    course = descend([Group([p], 0.1)], of(p), loss, ROWS[:-1], ROWS[-1:], epochs=0, generator=gen())
    assert course.steps == 0 and course.after == course.before and not p.any()


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_descent_goes_on_behind_the_last_epoch(stop):
    """Broken off and resumed: the same parameters and losses, to the bit; one group moves once in three steps."""

    class Killed(Exception):
        pass

    def course(p, loss, **more):
        other = nn.Parameter(torch.zeros(5))

        def make():
            return {"p": 2 * p + other}

        return descend([Group([p], 0.1, 3), Group([other], 0.03)], make, loss, ROWS[:-1], ROWS[-1:], epochs=4, **more)

    whole, loss = problem(0.3)
    wanted = course(whole, loss, generator=gen())
    states = []

    def keep(state):
        states.append(
            State(
                [t.clone() for t in state.parameters],
                [t.clone() for t in state.best],
                [{name: t.clone() for name, t in found.items()} for found in state.moments],
                state.generator.clone(),
                list(state.losses),
            )
        )
        if len(states) == stop:
            raise Killed

    p, loss = problem(0.3)
    with pytest.raises(Killed):
        course(p, loss, generator=gen(), keep=keep)
    again, loss = problem(0.3)
    found = course(again, loss, generator=gen(), resume=states[-1])
    assert torch.equal(again, whole)
    assert (found.before, found.losses, found.after) == (wanted.before, wanted.losses, wanted.after)


def wide(seed: int = 0):
    """A least-squares problem of 8,192 unknowns, above the size from which moments are of 8 bits."""
    wanted = torch.randn(8192, generator=torch.Generator().manual_seed(seed))
    p = nn.Parameter(torch.zeros(8192))
    return p, wanted, lambda made, rows: (made["p"] - wanted).square()[rows.start :: 8].mean()


def eight_bits() -> type[torch.optim.Optimizer]:
    pytest.importorskip("bitsandbytes", minversion="0.50")
    return optimizer_of("adamw_8bit")


def test_moments_of_8_bits_lead_where_those_of_32_do():
    ends, kept = [], []
    for optimizer in (optimizer_of("adamw"), eight_bits()):
        p, wanted, loss = wide()
        course = descend(
            [Group([p], 0.1)], lambda p=p: {"p": p}, loss, [slice(i, i + 8) for i in range(8)], [slice(0, 8)],
            epochs=24, generator=gen(), optimizer=optimizer, keep=kept.append,
        )  # fmt: skip
        assert course.after < 1e-2 * course.before
        ends.append(p.detach())
    # the error of one rounded moment is below 1/64 of the largest of its block, steps are of at most .1
    assert float((ends[0] - ends[1]).square().mean()) < 1e-2 * float(wanted.square().mean())
    found = kept[-1].moments[0]
    assert {t.dtype for t in found.values() if t.numel() == 8192} == {torch.uint8}
    assert sum(t.nbytes for t in found.values()) < 3 * 8192  # 8 * 8192 in float32


@pytest.mark.parametrize("stop", [1, 3])
def test_a_descent_with_moments_of_8_bits_goes_on(stop, tmp_path):
    """Through the file that distillation keeps, with a group that has not moved yet."""
    optimizer, ends, states = eight_bits(), [], []

    def course(**more):
        p, _, loss = wide()
        still, small = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(5))

        def make():
            return {"p": p * small.mean()}

        groups = [Group([p, small], 0.1), Group([still], 0.1)]
        found = descend(groups, make, loss, ROWS, ROWS[:1], epochs=4, generator=gen(), optimizer=optimizer, **more)
        ends.append((p.detach(), small.detach(), found.losses))

    def keep(state):
        states.append(state)
        if len(states) == stop:
            _write(tmp_path / "state", state)

    course(keep=keep)
    course(resume=_read(tmp_path / "state"))
    assert all(map(torch.equal, ends[0][:2], ends[1][:2])) and ends[0][2] == ends[1][2]


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim.adamw", None)
    with pytest.raises(BackendError, match="pip install 'bitsandbytes>=0.50', or take adamw"):
        optimizer_of("adamw_8bit")


def test_a_package_that_is_too_old_is_named(monkeypatch):
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr("lplr.hf.optimizers.version", lambda _: "0.49.2")
    with pytest.raises(BackendError, match="pip install 'bitsandbytes>=0.50'"):
        optimizer_of("adamw_8bit")


def test_step_sizes_rise_and_fall():
    sizes = [step_size(i, 100) for i in range(100)]
    assert max(sizes) == 1.0 and sizes.index(1.0) in (9, 10)
    assert sizes[:10] == sorted(sizes[:10]) and sizes[10:] == sorted(sizes[10:], reverse=True)
    assert 0 < sizes[-1] < 0.01 and step_size(0, 1) == 1.0


def test_relative_error_counts_tokens_alike():
    wanted = torch.tensor([[3.0, 4.0], [300.0, 400.0], [0.0, 0.0]])
    found = wanted + torch.tensor([[0.5, 0.0], [50.0, 0.0], [0.2, 0.0]])
    # 0.25 / 25, 2500 / 250000, 0.04 absolutely
    assert float(relative_error(found, wanted)) == pytest.approx((0.01 + 0.01 + 0.04) / 3, rel=1e-5)
