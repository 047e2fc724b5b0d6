"""README.md and docs/ say what is so: commands parse, links and paths lead somewhere, tables have the fields that the code has,
and the reader of docs/format.md reads what lplr writes."""

from __future__ import annotations

import inspect
import json
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
import yaml

import lplr
from lplr import cli
from lplr.evaluate.result import EvalResult
from lplr.factor import factorize
from lplr.factor.factorization import _PARTS, Format
from lplr.kernels.levels import WIDTHS, levels, narrower, packed_shape
from lplr.recipe import METHOD_NAMES, PRESETS, FactorSpec, Recipe, Recovery, Rule, make_recipe
from lplr.records import LayerRecord
from lplr.ship.export import Exported
from lplr.stream.shards import write_index, write_shard

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *DOCS]
APP: Any = typer.main.get_command(cli.app)


def named(path: Path) -> str:
    return path.stem


def fences(page: Path, language: str | None = None) -> list[str]:
    """The fenced blocks of a page, those of one language only if it is named."""
    found = re.findall(r"^ *```(\w*)\n(.*?)^ *```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [inspect.cleandoc(body) for kind, body in found if language in (None, kind)]


def spans(page: Path) -> list[str]:
    """The inline code of a page."""
    prose = re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def lines(page: Path) -> list[str]:
    """The lines of all fenced blocks, those that a backslash carries on as one."""
    return [line.strip().removeprefix("$ ") for body in fences(page) for line in body.replace("\\\n", " ").splitlines()]


def commands() -> list[Any]:
    found = [(page, line) for page in PAGES for line in lines(page) if line.startswith("lplr ")]
    return [pytest.param(line, id=f"{page.stem}: {line[:60]}") for page, line in found]


@pytest.mark.parametrize("line", commands())
def test_a_command_of_a_page_parses(line: str):
    name, *arguments = shlex.split(line, comments=True)[1:]
    command = APP.commands[name]
    with typer.Context(APP, info_name="lplr") as parent:
        assert command.make_context(name, arguments, parent=parent).params


def options(command: Any) -> set[str]:
    return {name for parameter in command.params for name in parameter.opts} | {"--help", "-h"}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_a_command_within_a_sentence_exists(page: Path):
    for span in spans(page):
        if span.startswith("lplr ") and "rotation SEED" not in span:
            words = re.split(r"[ =,]+", span)
            command = APP.commands.get(words[1])
            assert command or words[1].startswith("-"), span
            assert {w for w in words[1:] if w.startswith("-")} <= options(command or APP), span
        if re.fullmatch(r"--[\w-]+", span):
            assert any(span in options(command) for command in (APP, *APP.commands.values())) or span == "--python", span


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_scripts_targets_and_extras_of_a_page_exist(page: Path):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for text in [*lines(page), *spans(page)]:
        if text.startswith("make "):
            assert text.split()[1] in targets, text
        if found := re.match(r"python (\S+\.py)(.*)", text):
            script = (ROOT / found[1]).read_text()
            assert all(f'"{option}"' in script for option in re.findall(r"--[\w-]+", found[2])), text
        for asked in re.findall(r"pip install \S*\[([\w,]+)\]", text):
            assert set(asked.split(",")) <= set(extras), text


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_and_paths_of_a_page_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        assert re.match(r"https?://|#", target) or (page.parent / target.partition("#")[0]).exists(), target
    for span in spans(page):
        if re.fullmatch(r"(lplr|eval|tests|docs|recipes)/[\w./-]+", span) and "NAME" not in span:
            assert (ROOT / span).exists(), span
        if re.fullmatch(r"[\w-]+\.md", span):
            assert any((folder / span).is_file() for folder in (page.parent, ROOT)), span


@cache
def source() -> str:
    """All code, but this file."""
    files = [path for part in ("lplr", "tests") for path in (ROOT / part).rglob("*.py")]
    return "\n".join(path.read_text(encoding="utf-8") for path in files if path != Path(__file__))


@pytest.mark.parametrize("page", DOCS, ids=named)
def test_names_of_code_in_a_page_are_names_of_the_code(page: Path):
    for span in spans(page):
        for name in re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", span) and span.split(".") or ():
            if "_" in name.strip("_") or (name.isupper() and len(name) > 3):
                assert re.search(rf"\b{re.escape(name)}\b", source()), span


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_python_of_a_page_compiles(page: Path):
    for body in fences(page, "python"):
        compile(body, str(page), "exec")


def table(page: str, head: str) -> list[list[str]]:
    """The rows of the table whose first column is called `head`."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    found = re.search(rf"^\| {head} \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert found
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in found[1].splitlines()]


def test_the_settings_of_a_recipe_are_all_told_with_their_defaults():
    rows = table("recipes.md", "setting")
    assert [row[0].strip("` ") for row in rows] == list(Recipe.model_fields)
    for name, told, *_ in ((row[0].strip("` "), *row[1:]) for row in rows):
        default = Recipe.model_fields[name].default
        if name != "model":
            shown = ", ".join(default) if isinstance(default, tuple) else default
            if isinstance(default, Recovery):
                shown = next(preset for preset, meant in PRESETS.items() if meant == default)
            assert told == ("none" if shown in (None, "") else str(shown)), name


def test_the_recipe_of_the_page_does_what_the_page_says():
    (body,) = fences(ROOT / "docs/recipes.md", "yaml")
    recipe = make_recipe(yaml.safe_load(body))
    assert recipe.spec_for("model.layers.1.self_attn.v_proj").bits_per_weight == 4
    last = recipe.spec_for("model.layers.0.self_attn.v_proj")
    assert (last.bits_per_weight, last.method, last.rank) == (2, "caldera", 16)
    said = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in said for name in Rule.model_fields)
    assert all(f"`{path.name}`" in said for path in (ROOT / "recipes").glob("*.yaml"))


def told(page: str) -> set[str]:
    return set(spans(ROOT / "docs" / page))


def test_every_field_of_the_records_is_told():
    done = {"weights", "bits_per_weight", "parameters", "bytes", "bits_per_parameter", "files", "ledger_sha256", "seal"}
    assert set(LayerRecord.model_fields) - {"kind"} | done <= told("format.md")
    assert set(Format((1, 1)).to_dict()) | set(_PARTS) <= told("format.md")
    assert set(EvalResult.model_fields) <= told("evaluation.md")
    assert {field.name for field in fields(Exported)} <= told("export.md")


def test_every_method_is_in_the_table_of_the_readme():
    said = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Methods")[2].partition("\n## ")[0]
    assert all(f"`{name}`" in said for name in METHOD_NAMES)


@cache
def reader() -> dict[str, Any]:
    """The functions and tables of the reader."""
    names: dict[str, Any] = {}
    exec(fences(ROOT / "docs/format.md", "python")[0], names)
    return names


@pytest.mark.parametrize(("grid", "bits"), [(grid, bits) for grid in ("uniform", "trellis") for bits in WIDTHS[grid]])
def test_the_reader_has_the_points_of_every_width(grid: str, bits: float):
    n, d = 37, 5
    codes = torch.randint(256, packed_shape((n, d), grid, bits), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = reader()["points"](codes.numpy(), grid, bits, n, d)
    np.testing.assert_array_equal(found, levels(codes, (n, d), grid, bits, torch.float64).numpy())
    lower, ratio = narrower(grid, bits)
    if lower:
        assert ratio == (reader()["UNIFORM"][int(bits)] if grid == "uniform" else 1)


@pytest.mark.parametrize(
    ("method", "bits", "shape"),
    [
        ("ldlq", 2.3, (37, 24)),  # two trellises of two entries a step and one
        ("ldlq", 0.7, (16, 32)),
        ("ldlq", 1.0, (40, 64)),  # powers of two, one Hadamard transform
        ("ldlq", 0.45, (64, 33)),  # narrow columns of no bits
        ("ldlq", 7.5, (33, 17)),  # narrow columns of the uniform grid
        ("caldera", 3.2, (50, 48)),  # Q and L R
        ("double_binary", 1.5, (40, 60)),
        ("lplr_feedback", 2.0, (30, 50)),
        ("lplr", 2.5, (40, 41)),
        ("naive", 3.1, (20, 33)),
        ("ldlq", 4.0, (1, 9)),
    ],
)
def test_the_reader_of_the_page_reads_what_lplr_writes(method: str, bits: float, shape: tuple[int, int], tmp_path: Path):
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(shape, generator=generator)
    rank = 4 if method == "caldera" else None
    f = factorize(W, FactorSpec(method=method, bits_per_weight=bits, rank=rank), generator=generator)
    tensors = {f"model.layer.{part}": tensor for part, tensor in f.tensors().items()}
    write_shard(tmp_path / "one.safetensors", tensors)
    write_index(tmp_path, dict.fromkeys(tensors, "one.safetensors"), 0)
    layers = {"model.layer": f.format.to_dict()}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"layers": layers}}))
    W_hat = f.dequantize(torch.float64).numpy()
    # both in float64: rotations and products of some dozen terms round differently
    np.testing.assert_allclose(reader()["matrix"](tmp_path, "model.layer"), W_hat, rtol=0, atol=1e-13 * np.abs(W_hat).max())


PUBLIC = [name for name in lplr.__all__ if name != "__version__"]


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_has_a_docstring_of_its_own(name: str):
    found = getattr(lplr, name)
    assert found.__doc__ and (not inspect.isclass(found) or "__doc__" in vars(found))
    if inspect.isclass(found):
        for member, value in vars(found).items():
            if not member.startswith("_") and (inspect.isroutine(value) or isinstance(value, property | classmethod)):
                assert value.__doc__, f"{name}.{member}"


@pytest.mark.parametrize("name", APP.commands)
def test_the_help_of_a_command_reads_well(name: str):
    command = APP.commands[name]
    first = inspect.cleandoc(command.help).split("\n\n")[0]
    assert first.endswith(".") and first[0].isupper() and len(" ".join(first.split())) <= 130
    for parameter in command.params:
        assert parameter.help and parameter.help[0].isalnum() and parameter.help.endswith((".", ")")), parameter.name


def test_the_reference_of_the_public_names_is_built_without_a_warning(tmp_path: Path):
    pytest.importorskip("pdoc")
    done = subprocess.run(
        [sys.executable, ROOT / "docs/reference.py", tmp_path / "out", "lplr"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "HOME": str(tmp_path)},
    )
    assert not done.stdout and not done.stderr
    page = (tmp_path / "out/lplr.html").read_text(encoding="utf-8")
    assert all(f'id="{name}"' in page for name in PUBLIC)
    assert not re.search(r"(src|href)=\"https?://(?!pdoc\.dev)", page)  # a link to pdoc's own page, and nothing that is fetched
