"""Many runs in one process leave nothing behind; `eval/scale/soak.py` makes 200."""

from __future__ import annotations

from pathlib import Path

from eval.scale.soak import soak


def test_files_and_threads_are_flat_over_runs_in_one_process(tmp_path: Path):
    found = soak(8, 2, tmp_path)
    assert found["files"][1] <= found["files"][0] and found["threads"][1] <= found["threads"][0]
    assert found["growth in MiB"] < 32  # so few runs tell no slow leak: a whole model kept, with its graph, would be seen
