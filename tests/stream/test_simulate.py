"""The simulated runs of eval/scale are what arithmetic says where arithmetic can, and never better than ideal."""

from __future__ import annotations

from dataclasses import replace
from math import inf
from typing import Any

import pytest

from eval.scale import simulate
from eval.scale.simulate import ASSUMED, MODELS, Machine, Run, bound

MODEL = {"hidden": 1024, "inner": 3072, "blocks": 4, "heads": 8, "kv": 8, "vocabulary": 1000}
PLAIN = ("m", None, 4.0, False)
CALIBRATED = ("m", "c", 2.0, True)


def costs(per_million: float) -> dict[str, Any]:
    return {"terms (1e6, 1e9, 1e9, 1e9)": dict.fromkeys(simulate.TERMS, 0.0) | {"n d": per_million}}


def measured(bytes_a_second: float = inf, work: float = 1.0, rate: float = 1e11) -> dict[str, Any]:
    parts = {"m, factorized": costs(0.75 * work), "m, certified": costs(0.25 * work), "c": costs(0.1 * work)}
    rates = {"float32 products, operations": rate, "of a second moment, tokens d^2": rate, "pickled, bytes": bytes_a_second}
    disk = {"read, bytes": bytes_a_second, "written with SHA-256, bytes": bytes_a_second}
    return {"processor seconds of a matrix": parts, "a second, one thread": rates, "a second, of the disk": disk}


@pytest.fixture(autouse=True)
def no_overhead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ASSUMED, "seconds of a task beside its work", 0.0)


def total(run: Run, machine: Machine, count: int) -> float:
    return sum(run.seconds(machine, count).values())


def test_one_processor_takes_the_sum_of_all_work():
    run = Run(MODEL, PLAIN, measured())
    weights = 4 * (4 * 1024**2 + 3 * 1024 * 3072)
    assert total(run, Machine(cores=1, network=inf), 1) == pytest.approx(weights / 1e6)


def test_as_many_processors_as_matrices_take_the_longest():
    run = Run(MODEL, PLAIN, measured())
    assert total(run, Machine(cores=16, network=inf), 2) == pytest.approx(1024 * 3072 / 1e6)


def test_a_slow_network_is_what_a_run_takes():
    """Everything but the driver's share passes it."""
    run = Run(MODEL, PLAIN, measured(work=1e-9))
    slow = Machine(cores=1, network=1e3)
    sent = 2 * 4 * (4 * 1024**2 + 3 * 1024 * 3072)
    assert total(run, slow, 1) < 1
    assert total(run, slow, 64) <= 1.5 * sent / 1e3
    name, left = bound(Run(MODEL, PLAIN, measured(work=1e-2)), Machine(cores=1, network=1e5), 64)
    assert name == "network" and left["network"] < 0.7


def test_more_of_anything_is_never_slower_by_more_than_an_order_of_jobs_can_make_it():
    for recipe in (PLAIN, CALIBRATED):
        run = Run(MODEL, recipe, measured(1e9, rate=1e10))  # not where sending a block outlasts its passes: the last test
        times = [total(run, Machine(cores=4), count) for count in (1, 2, 4, 8, 16)]
        assert all(after <= 1.05 * before for before, after in zip(times, times[1:], strict=False))
        best = total(run, replace(Machine(cores=4), speed=2.0, network=inf, disk=2.0), 1)
        assert best == pytest.approx(times[0] / 2, rel=0.2)


def test_a_block_with_calibration_waits_for_the_one_before():
    """Any number of machines: text, curves, and the longest matrix of each stage, block after block."""
    run = Run(MODEL, CALIBRATED, measured())
    many = run.seconds(Machine(cores=16, network=inf), 64)
    stages = 2 * 1024**2 / 1e6 * 0.75 + 2 * 1024 * 3072 / 1e6 * 0.75  # q, o; gate, down
    assert many["matrices"] == pytest.approx(4 * stages)
    assert many["text"] == run.seconds(Machine(cores=16), 1)["text"]


def test_memory_limits_how_many_matrices_a_machine_works_on():
    machine = Machine()
    assert machine.slots((1024, 1024), False) == machine.cores
    assert 1 <= machine.slots((53248, 16384), False) < machine.cores
    assert Machine(memory=2**33).slots((53248, 16384), False) == 0


@pytest.mark.parametrize(("name", "billions"), [("Llama-2-7B", 6.74), ("Llama-2-70B", 68.98), ("Llama-3.1-405B", 405.85)])
def test_the_shapes_add_up_to_the_models(name: str, billions: float):
    model = MODELS[name]
    weights = sum(n * d for stage in simulate.stages(model) for n, d in stage) * model["blocks"]
    norms = model["hidden"] * (2 * model["blocks"] + 1)
    assert weights + norms + 2 * model["vocabulary"] * model["hidden"] == pytest.approx(billions * 1e9, rel=1e-3)


def test_the_text_is_spread_over_machines_until_each_has_a_batch():
    run = Run(MODEL, CALIBRATED, measured())
    alone, *more = (run.text(16 * 4096, Machine(cores=1, network=inf), count) for count in (1, 2, 4, 16, 64))
    assert [alone / t for t in more] == pytest.approx([2, 4, 16, 16])
    weights = 4 * 1024**2 + 3 * 1024 * 3072
    squares = 3 * 1024**2 + 3072**2
    assert alone == pytest.approx(16 * 4096 * (5 * 2 * weights + 3 * squares) / 1e11)
    # block and original to one other machine five times, eight batches of states; their moments, drifts and outputs back
    states = 8 * 2 * 4 * 4096 * 1024
    assert run.text_bytes(16 * 4096, 2) == pytest.approx((5 * (8 * weights + states), 8 * 2 * 4 * squares + states))
    assert run.text_bytes(16 * 4096, 1) == (0.0, 0.0)


def test_where_products_are_faster_than_the_network_other_machines_slow_the_passes_down():
    run = Run(MODEL, CALIBRATED, measured(rate=1e12))
    alone, many = (run.text(16 * 4096, Machine(cores=4), count) for count in (1, 8))
    assert many > 1.5 * alone
    assert many == pytest.approx(max(run.text_bytes(16 * 4096, 8)) / Machine().network)
