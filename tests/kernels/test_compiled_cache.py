"""What was compiled is kept on disk, and several processes share it: none may run the code of another function."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba")

from lplr.kernels.backend import jit

CLOSURES = """
from lplr.kernels.backend import jit

def make(number):
    def add(x):
        return x + number
    return jit()(add)

one, two = make(1), make(2)

@jit()
def both(x):
    return one(x) + 10 * two(x)
"""


def run(code: str, folder: Path) -> str:
    path = os.pathsep.join([str(folder), str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "NUMBA_CACHE_DIR": str(folder / "kept")}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=folder, check=True, capture_output=True, text=True
    ).stdout


def test_functions_of_one_name_from_two_processes(tmp_path: Path) -> None:
    """numba numbers them from 1 in each process: the first process' `two` has the number of the second one's `one`."""
    (tmp_path / "closures.py").write_text(CLOSURES)
    assert run("import closures; print(closures.two(0))", tmp_path) == "2\n"
    assert run("import closures; print(closures.one(0), closures.both(0))", tmp_path) == "1 21\n"
    assert run("import closures; print(closures.both(0))", tmp_path) == "21\n"


def function(x: Any) -> Any:
    return 2 * x


def kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Where what is compiled of `function` is kept, as a process sees it that has just begun."""
    monkeypatch.setattr("numba.core.config.CACHE_DIR", str(folder))
    return jit()(function)._cache._cache_file


def test_two_processes_write_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = (kept(tmp_path, monkeypatch) for _ in range(3))
    first._cache_path = second._cache_path = third._cache_path = str(tmp_path)
    begun = []

    def meanwhile(step: Any) -> Any:
        def change(*arguments: Any) -> Any:
            found = step(*arguments) if step.__name__ == "_load_index" else None  # an index that the other has not seen
            if not begun:
                begun.append(step)
                second.save("the other's", "of the other")
            return found if step.__name__ == "_load_index" else step(*arguments)

        return change

    for name in ("_load_index", "_save_data"):
        monkeypatch.setattr(first, name, meanwhile(getattr(first, name)))
    first.save("the one's", "of the one")
    assert begun and third.load("the one's") == "of the one" and third.load("the other's") == "of the other"
    assert third.load("nobody's") is None


def test_changed_sources_and_broken_files_are_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = kept(tmp_path, monkeypatch)
    ours._cache_path = str(tmp_path)
    ours.save("key", "code")
    assert ours.load("key") == "code"
    (file,) = tmp_path.glob("*.nbc")
    ours._source_stamp = "of other sources"
    assert ours.load("key") is None
    ours.save("key", "new code")
    assert ours.load("key") == "new code" and list(tmp_path.glob("*.nbc")) == [file]
    file.write_bytes(file.read_bytes()[:-3])
    assert ours.load("key") is None


def test_what_is_kept_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("numba.core.config.CACHE_DIR", str(tmp_path))
    x = np.arange(3.0)
    for found in (0, 1):
        compiled = jit()(function)
        np.testing.assert_array_equal(compiled(x), 2 * x)
        assert sum(compiled.stats.cache_hits.values()) == found
