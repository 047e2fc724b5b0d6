"""The command line: the whole path on a real model, and one line on stderr with status 2 for everything that is wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from typer.testing import CliRunner

from lplr import cli, records, terminal
from lplr.factor import METHODS

ROOT = Path(__file__).resolve().parents[1]
FAST = ["--alternations", "0", "--power-iterations", "0"]
DATA_FREE = ["--dataset", "none", *FAST]
LOADER = """
import sys, torch
import lplr
from transformers import AutoModelForCausalLM
small = AutoModelForCausalLM.from_pretrained(sys.argv[1])
dense = AutoModelForCausalLM.from_pretrained(sys.argv[2])
packed = {n: m for n, m in small.named_modules() if hasattr(m, "factorization")}
for name, module in packed.items():
    f = module.factorization
    dense.get_submodule(name).weight.data = f.dequantize(torch.float64).float()
norms = {n: t for n, t in small.state_dict().items() if "norm" in n}  # tuned
assert norms and set(norms) <= set(dense.state_dict())
dense.load_state_dict(norms, strict=False)
ids = torch.arange(3, 131).view(2, 64)
with torch.no_grad():
    difference = (small(input_ids=ids).logits - dense(input_ids=ids).logits).abs().max()
print(len(packed), float(difference))
"""


def call(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def process(*arguments: object, **more: Any) -> subprocess.CompletedProcess[str]:
    """The real command in a process of its own."""
    code = "import sys; sys.argv[0] = 'lplr'; from lplr.cli import main; main()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, **more)


def one_line(result: Any, named: str) -> None:
    """The shape of every error."""
    text = result.stderr
    status = result.exit_code if hasattr(result, "exit_code") else result.returncode
    assert status == 2, (status, text)
    lines = [line for line in text.splitlines() if not line.startswith("note: ")]
    assert len(lines) == 1 and lines[0].startswith("error: "), text
    assert re.search(named, lines[0]), text
    assert "Traceback" not in text and not result.stdout.strip()


@pytest.fixture
def base(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Path:
    made = checkpoints.write(tmp_path / "base", "llama")
    capfd.readouterr()
    return made


def test_the_whole_path_on_a_real_model(shared: Path, tmp_path: Path):
    source, out = shared / "data/models/stories260k", tmp_path / "out"
    text = shared / "data/calibration/tinystories_1mb.txt"
    done = call("compress", source, "--bits", 2, "--dataset", text, "--nsamples", 8, "--seqlen", 128, "-o", out)
    assert done.exit_code == 0, done.output
    told = re.search(r"([\d.]+) bits per weight on ([\d,]+) compressed weights", done.stdout)
    assert told
    last = records.read(out / "run.jsonl")[-1]
    assert told[1] == f"{last['bits_per_weight']:.4f}" and int(told[2].replace(",", "")) == last["weights"]
    assert 1.9 <= last["bits_per_weight"] <= 2

    checked = call("verify", out, "--against", source)
    assert checked.exit_code == 0 and "intact" in checked.stdout and "every certificate holds" in checked.stdout
    found = call("eval", out, "--against", source, "--dataset", text, "--windows", 4)
    assert found.exit_code == 0, found.output
    for word in ("perplexity", "KL", "top-1", "4 windows of 512 tokens", "BOS"):
        assert word in found.stdout
    assert json.loads((out / f"eval-{text.name}.json").read_text())["windows"] == 4
    written = call("report", out)
    assert written.exit_code == 0 and (out / "report.html").stat().st_size > 20_000
    assert call("verify", out).exit_code == 0  # what came later is no stranger

    loaded = subprocess.run(
        [sys.executable, "-c", LOADER, str(out), str(source)],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True,
    )
    layers, difference = loaded.stdout.split()
    assert int(layers) == 35 and float(difference) < 1e-4


def test_dry_run_prints_the_plan_and_writes_nothing(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    uniform = ["--bits", 4, "--allocation", "uniform", *DATA_FREE]
    shown = call("compress", base, *uniform, "--dry-run")
    assert shown.exit_code == 0, shown.output
    assert not list((tmp_path / "here").iterdir())
    made = call("compress", base, *uniform, "-o", "out")
    assert made.exit_code == 0
    rows = list(records.layers(records.read(tmp_path / "here/out/run.jsonl")))
    for row in rows:
        line = next(x for x in shown.stdout.splitlines() if f" {row.name} " in x)
        assert re.search(rf"│ {row.rank} +│ {row.l_bits:g}/{row.r_bits:g}/{row.q_bits:g} +│ {row.bits_per_weight:.4f}", line)
    size = sum(p.stat().st_size for p in (tmp_path / "here/out").glob("*.safetensors"))
    assert f"together {size:,} bytes" in shown.stdout
    assert "at most" not in shown.stdout and "are allocated" not in shown.stdout


def test_dry_run_says_that_bits_are_allocated_later(base: Path, tmp_path: Path):
    shown = call("compress", base, "--bits", 3.3, *DATA_FREE, "--dry-run")
    assert shown.exit_code == 0, shown.output
    assert "The bits of 21 matrices are allocated when the run has measured" in shown.stdout
    assert call("compress", base, "--bits", 3.3, *DATA_FREE, "-o", tmp_path / "out").exit_code == 0
    done = records.read(tmp_path / "out/run.jsonl")[-1]
    bits = re.search(r"bits per weight, all-in +│ at most ([\d.]+)", shown.stdout)
    size = re.search(r"-> at most ([\d.]+) KiB", shown.stdout)
    assert bits and size and done["bits_per_weight"] <= float(bits[1]) <= 3.3
    assert done["bytes"] / 1024 <= float(size[1]) * 1.001  # printed with four digits


@pytest.fixture
def big(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Path:
    """Large enough that the matrices outweigh what is allowed for headers and records."""
    made = checkpoints.write(tmp_path / "big", "llama", hidden_size=128, intermediate_size=256, head_dim=32)
    capfd.readouterr()
    return made


def allowed(result: Any) -> float:
    found = re.search(r"allows ([\d.]+) bits a weight", result.stderr)
    assert result.exit_code == 0 and found, result.output
    return float(found[1])


def test_a_budget_in_bytes(big: Path, tmp_path: Path):
    shown = call("compress", big, "--size", "400KB", *DATA_FREE, "--dry-run", "-o", tmp_path / "out")
    bits = allowed(shown)
    assert 1 < bits < 4 and f"at most {bits:.4f}" in shown.stdout and not (tmp_path / "out").exists()
    made = call("compress", big, "--size", "400KB", *DATA_FREE, "-o", tmp_path / "out")
    assert allowed(made) == bits == records.read(tmp_path / "out/run.jsonl")[0]["recipe"]["bits"]
    assert sum(p.stat().st_size for p in (tmp_path / "out").iterdir()) <= 400_000
    few, more = (allowed(call("compress", big, "--fit", "500kB", "--context", n, *DATA_FREE, "--dry-run")) for n in (64, 16))
    assert few < more


def test_what_is_no_budget(big: Path, tmp_path: Path):
    for flags, named in (
        (["--size", "400KB", "--bits", "2"], "one of --bits, --size and --fit"),
        (["--fit", "400KB", "--bits", "2"], "one of --bits, --size and --fit"),
        (["--size", "400KB", "--fit", "1GiB"], "one of --bits, --size and --fit"),
        (["--size", "2 gallons"], "'2 gallons' is no size: write a number and a unit"),
        (["--fit", "-1GB"], "'-1GB' is no size"),
        (["--size", "100KB"], "100,000 bytes are too few for a folder at any width"),
        (["--fit", "1KB"], "too few for the device"),
        (["--size", "400KB", "--allocation", "none"], "'allocation' is 'none'"),
    ):
        one_line(call("compress", big, "-o", tmp_path / "out", *DATA_FREE, *flags), named)
        one_line(call("compress", big, "--dry-run", *DATA_FREE, *flags), named)
    one_line(process("compress", "m", "--fit", "8GiB", "--context", "0"), "'--context'")
    assert not (tmp_path / "out").exists()


def test_the_default_folder_bears_the_name_and_the_bits(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(base)
    (tmp_path / "run").mkdir()
    assert cli._default_folder(cli.make_recipe({"model": ".", "bits": 1.5})) == Path("base-LPLR-1.5bpw")
    assert cli._default_folder(cli.make_recipe({"model": "owner/name"})) == Path("name-LPLR-1bpw")
    assert cli._default_folder(cli.make_recipe({"model": "owner/name:file.gguf"})) == Path("file-LPLR-1bpw")


def test_a_recipe_file_and_flags_that_override_it(base: Path, tmp_path: Path):
    rules = "rules:\n  - {match: '*.q_proj', bits: 8, method: naive}\n"
    (tmp_path / "r.yaml").write_text(f"model: {base}\nbits: 2\ndataset: none\nalternations: 0\nmethod: naive\n{rules}")
    assert call("compress", "--recipe", tmp_path / "r.yaml", "--bits", 4, "-o", tmp_path / "out").exit_code == 0
    header = records.read(tmp_path / "out/run.jsonl")[0]["recipe"]
    assert (header["bits"], header["method"], header["rules"][0]["bits"]) == (4, "naive", 8)
    again = call("compress", "--recipe", tmp_path / "out/recipe.yaml", "-o", tmp_path / "out")
    assert again.exit_code == 0  # the recipe that the folder holds is that of its run
    (tmp_path / "bad.yaml").write_text("bitss: 2\n")
    one_line(call("compress", base, "--recipe", tmp_path / "bad.yaml"), "unknown setting 'bitss': did you mean 'bits'")


def test_layers_that_stay_dense_say_so(base: Path, tmp_path: Path):
    (tmp_path / "r.yaml").write_text("dataset: none\nrules:\n  - {match: '*k_proj', bits: 0.01}\n")
    done = call("compress", base, "--recipe", tmp_path / "r.yaml", "--bits", 4, *FAST, "-o", tmp_path / "out")
    assert done.exit_code == 0
    assert "model.layers.0.self_attn.k_proj stays dense: not even rank 1 fits 0.01 bits per weight" in done.stdout


def test_inspect_shows_every_matrix(base: Path):
    shown = call("inspect", base, "--bits", 4, "--method", "lplr")
    assert shown.exit_code == 0 and shown.stdout.count("_proj") == 21
    line = next(x for x in shown.stdout.splitlines() if "layers.0.mlp.up_proj" in x)
    assert re.search(r"40 x 24 +│ [\d.]+ +│ [\d.]+ +│ \d+ +│ [\d.]+%", line)


def test_inspect_shows_the_bits_that_would_be_given_and_those_that_were(base: Path, tmp_path: Path):
    text = ["--dataset", base / "text.txt", "--nsamples", 6, "--seqlen", 32]
    before = call("inspect", base, "--bits", 2, *text)
    assert before.exit_code == 0 and before.stdout.count("_proj") == 42, before.output
    assert call("compress", base, "--bits", 2, *text, *FAST, "-o", tmp_path / "out").exit_code == 0
    after = call("inspect", tmp_path / "out")
    assert after.exit_code == 0 and "predicted loss in nats a token" in after.stdout

    def rows(shown: str) -> dict[str, list[str]]:
        lines = (line.split("│")[1:-1] for line in shown.splitlines() if line.count("│") == 8)
        return {name.strip(): [cell.strip() for cell in cells] for name, *cells in lines}

    found = rows(after.stdout)
    assert found == rows(before.stdout) and len(found) == 22
    assert found["model.layers.0.mlp.up_proj"][2] == "-"  # the curve of a budget of 2 bits begins above 1
    assert all(re.fullmatch(r"[\d.e-]+", cell) for cells in found.values() for cell in cells[3:])
    assert call("compress", base, "--bits", 2, "--allocation", "uniform", *DATA_FREE, "-o", tmp_path / "same").exit_code == 0
    plain = call("inspect", tmp_path / "same")
    assert plain.exit_code == 0 and "No bits were allocated" in plain.stdout and plain.stdout.count("_proj") == 21
    free = call("inspect", base, "--bits", 2, "--dataset", "none")
    assert free.exit_code == 0 and "relative squared error" in free.stdout
    one_line(call("inspect", base, "--method", "lplr", "--dataset", "none"), "no matrix takes part in an allocation")
    one_line(call("inspect", base, "--dataset", tmp_path / "missing.txt"), "does not exist")


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--bits", "0"], "'bits' is 0"),
        (["--bits", "-1"], "'bits' is -1"),
        (["--bits", "17"], "'bits' is 17"),
        (["--bits", "nan"], "'bits' is nan"),
        (["--method", "lpl"], "unknown method 'lpl'.*did you mean 'lplr'"),
        (["--sketch", "gausian"], "'sketch' is 'gausian': input should be 'gaussian'"),
        (["--rounding", "up"], "'rounding' is 'up'"),
        (["--nsamples", "0"], "'nsamples' is 0"),
        (["--dataset", "nothing.txt"], "does not exist"),
        (["--dataset", "builtinn"], "did you mean 'builtin'"),
        (["--device", "cuda:99"], "device 'cuda:99' cannot be used"),
        (["--recipe", "none.yaml"], "recipe none.yaml does not exist"),
        (["--bits", "0.001"], "raise --bits"),
    ],
)
def test_wrong_settings(flags: list[str], named: str, base: Path, tmp_path: Path):
    given = flags if "--dataset" in flags else [*DATA_FREE, *flags]
    one_line(call("compress", base, "-o", tmp_path / "out", *given), named)
    assert not (tmp_path / "out").exists()


def test_wrong_models(base: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("x")
    (tmp_path / "file.gguf").write_text("x")
    for model, named in (
        (tmp_path / "missing", "no such file or folder"),
        (tmp_path / "empty", "config.json does not exist"),
        (tmp_path / "file.txt", "is a file"),
        (tmp_path / "file.gguf", "file.gguf"),
        ("", "empty name"),
    ):
        one_line(call("compress", model, "-o", tmp_path / "out", *DATA_FREE), named)
    assert not (tmp_path / "out").exists()
    one_line(call("compress", *DATA_FREE), "no model given")


def test_nan_in_a_weight_leaves_nothing_that_loads(base: Path, tmp_path: Path):
    name = "model.layers.2.mlp.down_proj.weight"
    checkpoints.change_tensor(base, name, lambda t: t.fill_(float("nan")))
    one_line(call("compress", base, "-o", tmp_path / "out", "--bits", 4, *DATA_FREE), f"{name}: 960 NaN")
    for command in (("eval", tmp_path / "out"), ("verify", tmp_path / "out"), ("compress", tmp_path / "out")):
        one_line(call(*command), "config.json|is not finished")


def test_folders_of_other_runs(base: Path, tmp_path: Path):
    out = tmp_path / "out"
    assert call("compress", base, "-o", out, "--bits", 4, *DATA_FREE).exit_code == 0
    one_line(call("compress", base, "-o", out, "--bits", 3, *DATA_FREE), r"recipe\.bits was 4\.0, now 3\.0")
    one_line(call("compress", base, "-o", out, "--bits", 4, *DATA_FREE, "--no-resume"), "--no-resume")
    one_line(call("compress", out, "-o", tmp_path / "again", *DATA_FREE), r"quantized already \(lplr\)")
    one_line(call("compress", base, "-o", base, *DATA_FREE), "is not empty")


def test_a_full_disk(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import errno

    true, left = os.fsync, [12]

    def fsync(handle: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        true(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    one_line(call("compress", base, "-o", tmp_path / "out", "--bits", 4, *DATA_FREE), "the disk or the quota is full.*make room")
    assert not (tmp_path / "out/config.json").exists()
    monkeypatch.undo()
    assert call("compress", base, "-o", tmp_path / "out", "--bits", 4, *DATA_FREE).exit_code == 0
    assert call("verify", tmp_path / "out", "--against", base).exit_code == 0


def test_eval_verify_report_and_inspect_on_what_is_not_theirs(base: Path, tmp_path: Path):
    one_line(call("eval", tmp_path / "missing"), "no such file or folder")
    one_line(call("eval", base, "--dataset", base / "text.txt", "--seqlen", 4096), "64")
    one_line(call("eval", base, "--device", "cuda:99"), "cuda:99")
    one_line(call("eval", base, "--dataset", tmp_path / "missing.txt"), "does not exist")
    one_line(call("verify", tmp_path / "missing"), "is no folder")
    one_line(call("verify", base), r"holds no run\.jsonl")
    one_line(call("report", tmp_path / "missing"), "missing")
    one_line(call("report", base), r"run\.jsonl")
    one_line(call("inspect", tmp_path / "missing"), "no such file or folder")
    one_line(call("inspect", base, "--bits", 99), "'bits' is 99")


def test_out_of_memory_is_told(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr("lplr.stream.matrix.factorize", fail)
    one_line(call("compress", base, "-o", tmp_path / "out", "--bits", 4, *DATA_FREE), "out of memory: .*--dry-run")


def test_a_fault_of_the_program_is_not_hidden(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("lplr.stream.matrix.factorize", fail)
    result = call("compress", base, "-o", tmp_path / "out", "--bits", 4, *DATA_FREE)
    assert isinstance(result.exception, RuntimeError) and result.exit_code == 1


def test_wrong_usage_in_the_real_command_is_one_line_too(tmp_path: Path):
    for arguments, named in (
        (["compress", "m", "--bits", "abc"], "'--bits'.*see `lplr compress --help`"),
        (["compress", "m", "--colour", "red"], "No such option: --colour.*see `lplr compress --help`"),
        (["comprss"], "No such command 'comprss'"),
        (["verify"], "Missing argument 'DIR'"),
    ):
        one_line(process(*arguments, cwd=tmp_path), named)


def test_help_fits_a_hundred_columns_and_tells_the_defaults():
    assert process().stdout == process("--help").stdout
    shown = process("compress", "--help")
    assert shown.returncode == 0 and not shown.stderr
    assert max(map(len, shown.stdout.splitlines())) <= 100
    flat = " ".join(shown.stdout.replace("│", " ").split())
    for word in ("(1)", "(builtin)", "(128)", "(512)", "(from the budget)", "(NAME-LPLR-BITSbpw)", "(lm_head, embed_out, score)"):
        assert word in flat
    for method in METHODS:
        assert re.search(rf"\b{method}\b", flat)
    assert process("--version").stdout.startswith("lplr 0.")


def test_interrupted_it_says_how_to_go_on(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("lplr.stream.matrix.factorize", stop)
        result = call("compress", base, "-o", tmp_path / "out", "--bits", 4, *DATA_FREE)
    assert result.exit_code == 130 and result.stderr == "stopped; run the same command again to go on\n"
    assert call("compress", base, "-o", tmp_path / "out", "--bits", 4, *DATA_FREE).exit_code == 0


def test_a_signal_stops_the_real_command_with_status_130(base: Path, tmp_path: Path):
    # a shell that starts the tests in the background has their processes ignore the signal
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{heard}; import sys; sys.argv[0] = 'lplr'; from lplr.cli import main; main()"
    arguments = ["compress", str(base), "-o", str(tmp_path / "out"), "--bits", "4", "--dataset", str(base / "text.txt")]
    long = ["--nsamples", "40", "--seqlen", "64", "--alternations", "100", "--method", "caldera"]
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments, *long],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as running:
        while not (tmp_path / "out/run.jsonl").exists() and running.poll() is None:
            time.sleep(0.01)
        running.send_signal(signal.SIGINT)
        _, text = running.communicate()
    assert running.returncode == 130, text
    assert text == "stopped; run the same command again to go on\n"


def test_progress_of_a_log_is_plain_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    clock = iter(range(0, 1000, 15))
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(clock))
    with terminal.progress_bar("compress") as step:
        for i in range(4):
            step(float(i), 4.0, f"block {i}")
    told = capsys.readouterr().err.splitlines()
    assert told == ["compress: block 1 (25%, 1 min 30 s left)", "compress: block 3 (75%, 20 s left)"]


def test_progress_goes_to_stderr_and_the_tables_to_stdout(base: Path, tmp_path: Path):
    done = process("compress", base, "-o", tmp_path / "out", "--bits", 4, *DATA_FREE, "--seqlen", 32)
    assert done.returncode == 0
    assert "bits per weight" in done.stdout and done.stderr == ""
    found = process("eval", tmp_path / "out", "--against", base, "--dataset", base / "text.txt")
    assert found.returncode == 0 and found.stderr == "" and "perplexity" in found.stdout
