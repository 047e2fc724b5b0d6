"""`make bench`: its steps are real commands with options that their scripts take, nothing of eval/ is forgotten, what is done is
passed over, and a step that fails stops no other."""

from __future__ import annotations

import argparse
import json
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from lplr import cli

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "eval"))
import bench  # noqa: E402

APP: Any = typer.main.get_command(cli.app)
COMMANDS = {**{step.name: step.command for step in bench.STEPS}, **{name: made.command for name, made in bench.MADE.items()}}


class Parsed(Exception):
    """What a script understood of its command line."""


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_of_a_step_is_taken_by_its_script(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    script, *arguments = shlex.split(COMMANDS[name])
    arguments = [re.sub(r"\{\w+\}", str(tmp_path), word) for word in arguments]
    if script == "lplr":
        with typer.Context(APP, info_name="lplr") as parent:
            assert APP.commands[arguments[0]].make_context(arguments[0], arguments[1:], parent=parent).params
        return
    path = ROOT / script
    if "import ray" in path.read_text():
        pytest.importorskip("ray", reason="its script needs the extra ray")
    if "ArgumentParser" not in path.read_text():
        assert not arguments and path.is_file()
        return
    real = argparse.ArgumentParser.parse_args

    def stop(self: argparse.ArgumentParser, *given: Any) -> None:
        raise Parsed(real(self, *given))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.syspath_prepend(str(path.parent))
    before = set(sys.modules)
    try:
        with pytest.raises(Parsed):
            runpy.run_path(str(path), run_name="__main__")
    finally:  # scripts of two folders may have neighbours of one name
        for module in set(sys.modules) - before:
            if str(getattr(sys.modules[module], "__file__", None) or "").startswith(str(ROOT / "eval")):
                del sys.modules[module]


def test_every_script_is_a_step_or_left_out_for_a_reason():
    scripts = {str(p.relative_to(ROOT)) for p in (ROOT / "eval").rglob("*.py") if '__name__ == "__main__"' in p.read_text()}
    run = {step.command.split()[0] for step in bench.STEPS}
    assert run | set(bench.LEFT_OUT) == scripts and not run & set(bench.LEFT_OUT)
    assert all(bench.LEFT_OUT.values())


def test_every_place_is_known_and_every_result_has_one_owner_or_is_merged():
    for name, command in COMMANDS.items():
        for place in bench.places(command):
            assert place in bench.MADE or place in bench.DATA or place in ("cache", "to"), (name, place)
    assert len({step.name for step in bench.STEPS}) == len(bench.STEPS)
    results = {step.result for step in bench.STEPS} - {""}
    gpu = {"kernels_gpu.json"}
    assert {p.name for p in bench.RESULTS.glob("*.json")} - gpu <= results


def test_every_peer_is_in_one_step():
    sys.path.insert(0, str(ROOT / "eval/quality"))
    from peer_libraries import PACKAGES, PEERS, WORKERS

    rows = [word for step in bench.STEPS if step.name.startswith("peers_") for word in step.command.split() if word in PEERS]
    assert sorted(rows) == sorted(PEERS)
    assert {library for library, _ in PEERS.values()} == set(WORKERS) == set(PACKAGES)


def test_words_pick_steps_by_name_or_by_their_beginning():
    assert [s.name for s in bench.chosen(["papers_images", "grids"])] == ["grids", "papers_images"]
    assert {s.name for s in bench.chosen(["peers"])} == {s.name for s in bench.STEPS if s.name.startswith("peers_")}
    assert bench.chosen([]) == list(bench.STEPS)
    with pytest.raises(SystemExit, match="no step 'paper': choose among published"):
        bench.chosen(["paper"])


SCRIPT = """
import sys, pathlib
pathlib.Path(sys.argv[1]).open("a").write(sys.argv[2] + "\\n")
print("said", sys.argv[2])
sys.exit(int(sys.argv[3]))
"""


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three steps that note that they ran; the second one fails, the third needs something that is made first."""
    (tmp_path / "eval").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "make.py").write_text("import sys, pathlib; t = pathlib.Path(sys.argv[1]); t.mkdir(); (t / 'ready').touch()")
    steps = (
        bench.Step("one", "script.py {data}/ran one 0", "one.json", 1),
        bench.Step("two_fails", "script.py {data}/ran two 3", "", 1),
        bench.Step("two_needs", "script.py {data}/ran {thing} 0", "", 1),
        bench.Step("lost", "script.py {data}/ran {never} 0", "", 1),
    )
    made = {"thing": bench.Made("make.py {to}", "ready", 1), "never": bench.Made("make.py {data}/nowhere/at/all", "ready", 1)}
    for name, value in {"ROOT": tmp_path, "RESULTS": tmp_path, "STEPS": steps, "MADE": made, "DATA": {"data": "."}}.items():
        monkeypatch.setattr(bench, name, value)
    return tmp_path


def call(folder: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    where = ["--data", str(folder / "data"), "--cache", str(folder / "cache")]
    monkeypatch.setattr(sys, "argv", ["bench.py", *words, *where])
    with pytest.raises(SystemExit) as end:
        bench.main()
    assert isinstance(end.value.code, int)
    return end.value.code


def ran(folder: Path) -> list[str]:
    found = [Path(line).name.partition("-")[0] for line in (folder / "data/ran").read_text().splitlines()]
    (folder / "data/ran").unlink()
    return found


def test_a_failing_step_stops_no_other_and_the_status_says_so(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert call(small, monkeypatch) == 1
    assert ran(small) == ["one", "two", "thing"]
    told = capsys.readouterr().out
    assert "said one" in told and "said two" in (small / "cache/logs/two_fails.log").read_text()
    rows = {line.split()[0]: line for line in told.partition("\nstep ")[2].splitlines()[1:]}
    assert list(rows) == ["one", "two_fails", "thing", "two_needs", "never", "lost"]
    assert rows["one"].endswith(" done") and "failed with status 3: see" in rows["two_fails"]
    assert "failed with status 1" in rows["never"] and "not run: never could not be made" in rows["lost"]


def test_what_is_done_with_the_same_settings_is_passed_over(small: Path, monkeypatch: pytest.MonkeyPatch):
    (small / "one.json").write_text("{}")
    assert call(small, monkeypatch, "one", "two_needs") == 0 and ran(small) == ["one", "thing"]
    assert call(small, monkeypatch, "one", "two") == 1 and ran(small) == ["two"]  # only what failed
    assert call(small, monkeypatch, "one", "--force") == 0 and ran(small) == ["one"]
    (small / "one.json").unlink()
    assert call(small, monkeypatch, "one") == 0 and ran(small) == ["one"]  # its result is gone
    (small / "one.json").write_text("{}")
    other = bench.Step("one", "script.py {data}/ran other 0", "one.json", 1)
    monkeypatch.setattr(bench, "STEPS", (other,))
    assert call(small, monkeypatch) == 0 and ran(small) == ["other"]  # other settings
    assert json.loads((small / "cache/done/one.json").read_text())["command"] == other.command


def test_data_that_is_not_there_is_said(small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    (small / "data").rmdir()
    assert call(small, monkeypatch, "one") == 1
    assert "say where the data folder is" in capsys.readouterr().out


def test_the_list_tells_minutes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys, "argv", ["bench.py", "--list", "papers"])
    bench.main()
    told = capsys.readouterr().out
    assert re.search(r"^papers_images +\d+ min  eval/papers/images.py -> papers_images.json$", told, re.MULTILINE)
    assert "first minilm" in told and "together about" in told and "peers" not in told


def test_codes_are_unpacked_as_they_were_packed():
    """auto-round's format, packed here bit by bit."""
    sys.path.insert(0, str(ROOT / "eval/quality"))
    import torch
    from peer_libraries import unpacked

    draw = torch.Generator().manual_seed(0)
    for bits, (n, d), group in ((4, (16, 64), 32), (2, (32, 48), 16), (8, (8, 12), 4)):
        codes, zeros = torch.randint(2**bits, (d, n), generator=draw), torch.randint(2**bits, (d // group, n), generator=draw)
        scales = torch.rand(d // group, n, generator=draw).half()
        per = 32 // bits
        qweight = [[word(codes[i * per : (i + 1) * per, j], bits) for j in range(n)] for i in range(d // per)]
        qzeros = [[word(zeros[g, j * per : (j + 1) * per], bits) for j in range(n // per)] for g in range(d // group)]
        stored = {"qweight": signed(qweight), "qzeros": signed(qzeros), "scales": scales}
        want = torch.empty(n, d)
        for i in range(d):
            want[:, i] = (codes[i] - zeros[i // group]) * scales[i // group].float()
        torch.testing.assert_close(unpacked(stored, bits, group), want, rtol=0, atol=0)
        of_group = torch.arange(d) // group
        torch.testing.assert_close(unpacked(stored, bits, group, 1), want - scales.float()[of_group].T, rtol=1e-6, atol=1e-6)


def word(codes: Any, bits: int) -> int:
    return sum(int(code) << bits * k for k, code in enumerate(codes))


def signed(words: list[list[int]]) -> Any:
    import numpy as np
    import torch

    return torch.from_numpy(np.array(words, np.uint32).view(np.int32))
