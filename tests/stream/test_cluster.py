"""A run on a real Ray cluster of three nodes has the bytes of one process, whatever dies on the way."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import ray_nodes
import torch
from runs import calibrated, fingerprints, run, settings, stopped, timeless

from lplr.errors import BackendError, CheckpointError
from lplr.stream import calibrate, cluster, compress
from lplr.stream.cluster import RETRIES, Cluster
from lplr.stream.verify import verify

pytest.importorskip("ray", reason="needs the package ray (extra `ray`)")
pytestmark = pytest.mark.filterwarnings("ignore")  # of Ray's own


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """Two nodes, to which a test may add."""
    with ray_nodes.joined(Path(__file__).parent) as made:
        ray_nodes.add(made)
        yield made


@pytest.fixture
def workers(nodes: Any) -> Iterator[Cluster]:
    made = Cluster(torch.device("cpu"))
    yield made
    made.close()


def test_with_one_of_three_nodes_killed_in_the_middle_a_run_has_the_same_bytes(nodes: Any, tmp_path: Path):
    source = checkpoints.write(tmp_path / "base", "llama", num_hidden_layers=10)
    chosen = settings(source, method="caldera", bits=3)
    run(chosen, tmp_path / "whole")
    node = ray_nodes.add(nodes)
    killed = []

    def kill(done: float, total: float, text: str) -> None:
        if text.startswith("block 3 of") and not killed:
            killed.append(text)
            nodes.remove_node(node, allow_graceful=False)

    run(chosen, tmp_path / "out", engine="ray", progress=kill)
    assert killed
    assert fingerprints(tmp_path / "out") == fingerprints(tmp_path / "whole")
    assert timeless(tmp_path / "out") == timeless(tmp_path / "whole")
    verify(tmp_path / "out", str(source))


def test_a_calibrated_run_has_the_same_bytes(nodes: Any, tmp_path: Path):
    source = checkpoints.write(tmp_path / "base", "mixtral")
    chosen = calibrated(source)
    run(chosen, tmp_path / "whole")
    run(chosen, tmp_path / "out", engine="ray")
    assert fingerprints(tmp_path / "out") == fingerprints(tmp_path / "whole")
    assert timeless(tmp_path / "out") == timeless(tmp_path / "whole")


def test_the_calibration_text_is_run_on_the_cluster(nodes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Three batches of two rows, for every stage of every block."""
    source = checkpoints.write(tmp_path / "base", "llama")
    monkeypatch.setattr(compress, "embed", lambda *given: calibrate.embed(*given, at_once=64))
    jobs = []
    job = Cluster._job

    def noted(self: Cluster, task: Any, what: str, work: Any, *given: Any) -> Any:
        jobs.append(work.__name__)
        return job(self, task, what, work, *given)

    monkeypatch.setattr(Cluster, "_job", noted)
    chosen = calibrated(source)
    run(chosen, tmp_path / "whole")
    assert not jobs
    run(chosen, tmp_path / "out", engine="ray")
    blocks = 3
    assert jobs.count("_collected") == 3 * 4 * blocks  # q, k, v; o; gate, up; down
    assert jobs.count("_advanced") == 3 * (blocks - 1)
    assert fingerprints(tmp_path / "out") == fingerprints(tmp_path / "whole")
    assert timeless(tmp_path / "out") == timeless(tmp_path / "whole")


def test_the_driver_does_what_no_machine_has_the_memory_for(workers: Cluster):
    for memory, elsewhere in ((1 << 50, False), (1 << 20, True)):
        made = list(workers.spread(process_of, (7,), ((2,), (3,)), memory=memory, what="a number"))
        assert [number for number, _ in made] == [72, 73]
        assert {process != os.getpid() for _, process in made} == {elsewhere}


def process_of(tens: int, ones: int) -> tuple[int, int]:
    """A number, and who made it."""
    return 10 * tens + ones, os.getpid()


def test_a_run_that_is_stopped_goes_on_with_either_engine(nodes: Any, tmp_path: Path):
    source = checkpoints.write(tmp_path / "base", "llama", num_hidden_layers=4)
    chosen = settings(source, method="lplr")
    run(chosen, tmp_path / "whole")
    for first, then in (("ray", "local"), ("local", "ray")):
        out = tmp_path / first
        stopped(chosen, out, after=2, engine=first)
        shards = {p.name: p.stat().st_mtime_ns for p in out.glob("*.safetensors")}
        assert len(shards) >= 2
        run(chosen, out, engine=then)
        assert fingerprints(out) == fingerprints(tmp_path / "whole")
        assert {name: (out / name).stat().st_mtime_ns for name in list(shards)[:2]} == dict(list(shards.items())[:2])


def test_what_a_task_raises_comes_out_as_it_is(nodes: Any, tmp_path: Path):
    source = checkpoints.write(tmp_path / "base", "llama")
    name = "model.layers.1.mlp.up_proj.weight"
    checkpoints.change_tensor(source, name, lambda t: t.index_fill(0, torch.tensor([1]), float("nan")))
    with pytest.raises(CheckpointError) as told:
        run(settings(source, allocation="uniform"), tmp_path / "out", engine="ray")
    assert str(told.value).startswith(f"{name}: ") and "\n" not in str(told.value)
    assert type(told.value) is CheckpointError


def die(folder: str, times: int) -> int:
    """End the process as the system does when memory is short, the first `times` times."""
    seen = len(os.listdir(folder))
    if seen < times:
        (Path(folder) / f"{seen}-{time.time_ns()}").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return seen


def test_a_worker_that_dies_is_replaced_and_one_that_always_dies_ends_the_run(workers: Cluster, tmp_path: Path):
    assert workers.submit(die, str(tmp_path), 2).result() == 2
    with pytest.raises(BackendError, match=rf"die: the cluster has given it up after {RETRIES + 1} attempts .* run the same"):
        workers.submit(die, str(tmp_path), 1000).result()
    assert len(os.listdir(tmp_path)) == 2 + RETRIES + 1


def test_a_machine_of_another_kind_refuses(nodes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = checkpoints.write(tmp_path / "base", "llama")
    monkeypatch.setattr(cluster, "_machine", lambda: ("lplr 9.9", "AVX1024"))  # of the driver alone
    with pytest.raises(BackendError, match=r"where the driver has lplr 9\.9, AVX1024: its bytes may differ; install the same"):
        run(settings(source), tmp_path / "out", engine="ray")


def test_a_matrix_that_no_machine_holds_is_refused(workers: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = checkpoints.write(tmp_path / "base", "llama")
    monkeypatch.setattr(cluster, "LIBRARIES", 1 << 60)
    with pytest.raises(BackendError, match=r"_proj \(\d+ x \d+\) takes .* GiB, the largest machine .* add a larger one"):
        run(settings(source), tmp_path / "out", engine="ray")


def test_as_many_matrices_are_on_their_way_as_the_store_holds(workers: Cluster):
    assert workers.slots == 2
    assert workers.ahead(1) == 4 and workers.ahead(1 << 60) == 1
    store = 150 * 2**20  # of a node of `Cluster`, unless told otherwise
    assert workers.ahead(store // 3) == 3
