"""The same bytes whatever number of threads: files, records, allocation; every method, with and without calibration."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import checkpoints
import pytest

TESTS = Path(__file__).resolve().parents[1]

# large enough that torch shares out sums, products and factorizations among threads: it does from 2^15 entries on
SIZES = {"hidden_size": 384, "intermediate_size": 640, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
RUNS = [
    {"method": "auto", "bits": 2},
    {"method": "auto", "bits": 2, "dataset": "text", "nsamples": 8, "seqlen": 64},
    {"method": "caldera", "bits": 2.5, "dataset": "text", "nsamples": 8, "seqlen": 64, "rank": 16},
    *({"method": method, "bits": 1} for method in ("lplr", "lplr_svd", "direct_svd", "lplr_feedback", "double_binary")),
    {"method": "ldlq", "bits": 3, "grid": "lattice"},
    {"method": "naive", "bits": 4, "grid": "normal_float"},
    {"method": "double_binary", "bits": 1, "dataset": "text", "nsamples": 8, "seqlen": 64},
]
CODE = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(int(sys.argv[3]))
from runs import fingerprints, run, settings, timeless
source, out = Path(sys.argv[1]), Path(sys.argv[2])
found = []
for i, chosen in enumerate(json.loads(sys.argv[4])):
    more = {"dataset": str(source / "text.txt")} if "dataset" in chosen else {}
    run({**settings(source), "alternations": 1, "power_iterations": 1, **chosen, **more}, out / str(i))
    found.append([fingerprints(out / str(i)), timeless(out / str(i))])
print(json.dumps(found))
"""


@pytest.mark.slow
def test_the_same_bytes_with_one_two_and_three_threads(tmp_path: Path):
    source = checkpoints.write(tmp_path / "base", "llama", **SIZES)
    path = os.pathsep.join((str(TESTS.parent), str(TESTS)))
    environment = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")} | {"PYTHONPATH": path}
    found = []
    for threads in (1, 2, 3):
        command = [sys.executable, "-c", CODE, str(source), str(tmp_path / str(threads)), str(threads), json.dumps(RUNS)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout.splitlines()[-1]))
    for chosen, one, two, three in zip(RUNS, *found, strict=True):
        for other in (two, three):
            assert {name for name in one[0] if one[0][name] != other[0][name]} == set(), chosen
            assert other[1] == one[1], chosen
