"""eval/speed/profile_compress.py finds the stages that it times where the driver looks them up: twice it did not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import checkpoints

ROOT = Path(__file__).resolve().parents[2]


def test_the_profile_runs_and_accounts_for_the_stages(tmp_path: Path):
    source = checkpoints.write(tmp_path / "base", "llama")
    command = [sys.executable, ROOT / "eval/speed/profile_compress.py", "--model", source, "--dataset", source / "text.txt"]
    done = subprocess.run([*command, "--bits", "4", "--nsamples", "4"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for stage in ("certificates", "second moments behind", "factorization without the encoder", "writing", "error curves"):
        assert stage in done.stdout
    assert "a block:" in done.stdout
