"""A run that is killed at any moment and goes on ends with the bytes of an unbroken one; what changed meanwhile is refused."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import checkpoints
import pytest
from runs import calibrated, fingerprints, run, settings, stopped, timeless

from lplr.errors import OutputError
from lplr.stream.verify import verify

TESTS = Path(__file__).resolve().parents[1]


def test_a_finished_folder_is_left_as_it_is(tmp_path: Path):
    source = checkpoints.write(tmp_path / "base", "llama")
    first = run(settings(source), tmp_path / "out")
    stamps = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in (tmp_path / "out").iterdir()}
    assert run(settings(source), tmp_path / "out") == first
    assert {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in (tmp_path / "out").iterdir()} == stamps
    (tmp_path / "out" / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(OutputError, match=r"model-00002-of-00004\.safetensors is missing"):
        run(settings(source), tmp_path / "out")


KILLER = """
import os, random, resource, signal, sys
import torch
torch.set_num_threads(1)  # no thread pool: a forked child may compute
from lplr.recipe import make_recipe
from lplr.stream import compress as driver

def attempt(model, text, out, die):
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    try:
        die()
        driver.compress(make_recipe({settings} | {{"model": model, "dataset": text}}), out)
        os._exit(0)
    finally:
        os._exit(1)

def at_fsync(number):
    seen, true = [0], os.fsync
    def fsync(handle):
        seen[0] += 1
        if seen[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)
        true(handle)
    def die():
        os.fsync = fsync
    return die

def after(seconds):
    return lambda: signal.setitimer(signal.ITIMER_PROF, seconds)  # SIGPROF without a handler kills at once, as SIGKILL does

def spent():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
"""


def killer(body: str, chosen: dict[str, Any], *arguments: str) -> str:
    """Run the body in a process that forks a child for each attempt; its output."""
    code = KILLER.format(settings={k: v for k, v in chosen.items() if k not in ("model", "dataset")}) + textwrap.dedent(body)
    path = os.pathsep.join((str(TESTS.parent), str(TESTS)))
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_killed_at_every_flush_to_the_disk_a_run_ends_with_the_same_bytes(tmp_path: Path):
    source = checkpoints.write(tmp_path / "base", "llama", num_hidden_layers=1)
    chosen = settings(source, method="caldera")
    run(chosen, tmp_path / "whole")
    body = """
    model, root = sys.argv[1:]
    number = 0
    while True:
        number += 1
        out = f"{root}/{number}"
        status = attempt(model, "none", out, at_fsync(number))
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0, status
            break
        loads = os.path.exists(f"{out}/config.json")
        assert attempt(model, "none", out, lambda: None) == 0
        print(number, loads)
    """
    lines = killer(body, chosen, str(source), str(tmp_path / "killed")).splitlines()
    assert len(lines) > 15
    wanted, ledger = fingerprints(tmp_path / "whole"), timeless(tmp_path / "whole")
    for number in range(1, len(lines) + 2):
        assert fingerprints(tmp_path / "killed" / str(number)) == wanted
        assert timeless(tmp_path / "killed" / str(number)) == ledger
    # config.json, without which no loader takes the folder, comes after all else
    assert all(line.endswith("False") for line in lines[:-6])


def test_killed_at_random_moments_a_calibrated_run_ends_with_the_same_bytes(tmp_path: Path):
    source = checkpoints.write(tmp_path / "base", "llama", shards=2)
    chosen = calibrated(source, method="lplr")
    run(chosen, tmp_path / "whole")
    body = """
    model, root = sys.argv[1:]
    assert attempt(model, f"{model}/text.txt", f"{root}/first", lambda: None) == 0  # fills the caches of compiled code
    before = spent()
    assert attempt(model, f"{model}/text.txt", f"{root}/timed", lambda: None) == 0
    whole = spent() - before  # processor time: it does not depend on what else the machine does
    for seed in range(3):
        draw, kills = random.Random(seed), 0
        for _ in range(3):
            kills += attempt(model, f"{model}/text.txt", f"{root}/{seed}", after(draw.uniform(0.1, 0.6) * whole)) != 0
        assert attempt(model, f"{model}/text.txt", f"{root}/{seed}", lambda: None) == 0
        print(kills)
    """
    lines = killer(body, chosen, str(source), str(tmp_path / "killed")).splitlines()
    assert sum(map(int, lines)) >= 3
    for seed in ("timed", *map(str, range(3))):
        assert fingerprints(tmp_path / "killed" / seed) == fingerprints(tmp_path / "whole")
        assert timeless(tmp_path / "killed" / seed) == timeless(tmp_path / "whole")


@pytest.mark.parametrize(
    "change, named",
    [
        ({"bits": 2}, r"recipe\.bits was 4\.0, now 2\.0"),
        ({"seed": 1}, r"recipe\.seed was 0, now 1"),
        ({"method": "lplr"}, r"recipe\.method was 'auto', now 'lplr'"),
        ({"nsamples": 5}, r"recipe\.nsamples was 6, now 5"),
        ({"dataset": "none"}, r"recipe\.dataset was .*text\.txt', now 'none'"),
        ({"modules_to_not_convert": ["k_proj"]}, r"recipe\.modules_to_not_convert was \['lm_head'"),
        ({"rules": [{"match": "*.q_proj", "bits": 1}]}, r"recipe\.rules was \[\], now \["),
    ],
)
def test_a_changed_setting_is_refused_by_name(change: dict[str, Any], named: str, tmp_path: Path):
    source = checkpoints.write(tmp_path / "base", "llama")
    stopped(calibrated(source), tmp_path / "out")
    before = fingerprints(tmp_path / "out")
    with pytest.raises(OutputError, match=named):
        run({**calibrated(source), **change}, tmp_path / "out")
    assert fingerprints(tmp_path / "out") == before


def test_a_changed_source_text_tokenizer_or_config_is_refused(tmp_path: Path):
    source = checkpoints.write(tmp_path / "base", "llama")
    chosen = calibrated(source)
    stopped(chosen, tmp_path / "out")
    kept = {p.name: p.read_bytes() for p in source.iterdir()}

    def refused(named: str) -> None:
        with pytest.raises(OutputError, match=named):
            run(chosen, tmp_path / "out")
        for name, content in kept.items():
            (source / name).write_bytes(content)

    checkpoints.change_tensor(source, "model.norm.weight", lambda t: t + 1)
    refused(r"source\.model\.safetensors\.sample was")
    (source / "text.txt").write_text(checkpoints.text(seed=1))
    refused(r"calibration\.sha256 was")
    checkpoints.change_config(source, rms_norm_eps=1e-3)
    refused(r"files\.config\.json\.sha256 was")
    (source / "tokenizer_config.json").write_text((source / "tokenizer_config.json").read_text() + "\n")
    refused(r"files\.tokenizer_config\.json\.sha256 was")
    run(chosen, tmp_path / "out")
    verify(tmp_path / "out", str(source))


def test_a_torn_ledger_and_records_without_their_block_are_cut_off(tmp_path: Path):
    source = checkpoints.write(tmp_path / "base", "llama")
    chosen = calibrated(source)
    run(chosen, tmp_path / "whole")
    lines = (tmp_path / "whole/run.jsonl").read_bytes().splitlines(keepends=True)
    kinds = [json.loads(line)["kind"] for line in lines]
    last = max(i for i, kind in enumerate(kinds) if kind == "layer")
    # inside of the header; in and behind a record whose block line never came; inside of that line, and of the last
    for keep, torn in ((0, 30), (3, 40), (4, 0), (last + 1, 0), (last + 1, 50), (len(lines) - 1, 9)):
        shutil.copytree(tmp_path / "whole", tmp_path / f"{keep}-{torn}")
        (tmp_path / f"{keep}-{torn}/run.jsonl").write_bytes(b"".join(lines[:keep]) + lines[keep][:torn])
        run(chosen, tmp_path / f"{keep}-{torn}")
        assert fingerprints(tmp_path / f"{keep}-{torn}") == fingerprints(tmp_path / "whole")
        assert timeless(tmp_path / f"{keep}-{torn}") == timeless(tmp_path / "whole")


def test_a_finished_shard_that_was_altered_is_refused(tmp_path: Path):
    source = checkpoints.write(tmp_path / "base", "llama")
    stopped(settings(source), tmp_path / "out", after=2)
    checkpoints.flip(tmp_path / "out/model-00001-of-00004.safetensors", -3)
    with pytest.raises(OutputError, match=r"model-00001-of-00004\.safetensors is not what run\.jsonl says"):
        run(settings(source), tmp_path / "out")


def test_the_order_of_draws_does_not_matter(tmp_path: Path):
    """A resumed run compresses later blocks alone: their bytes must not depend on the earlier ones."""
    source = checkpoints.write(tmp_path / "base", "llama")
    stops = [random.Random(s).randint(1, 2) for s in range(2)]
    run(settings(source, method="lplr"), tmp_path / "whole")
    for i, stop in enumerate(stops):
        stopped(settings(source, method="lplr"), tmp_path / str(i), after=stop)
        run(settings(source, method="lplr"), tmp_path / str(i))
        assert fingerprints(tmp_path / str(i)) == fingerprints(tmp_path / "whole")
