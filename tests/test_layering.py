"""DESIGN section 3, read from the imports: who may import whom, and the one door of each heavy library."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "lplr"
ORDER = [
    "errors",
    "files",
    "recipe",
    "records",
    "metrics",
    "kernels",
    "linalg",
    "quant",
    "factor",
    "nn",
    "recover",
    "hf",
    "stream",
] + ["evaluate", "ship", "demo", "terminal", "tables", "cli"]
ALLOWED = {part: set(ORDER[: i + 1]) for i, part in enumerate(ORDER)}
ALLOWED["kernels"] = {"errors", "kernels"}
ALLOWED["report"] = {"errors", "files", "records", "report"}
ALLOWED["terminal"] = {"errors", "terminal"}
ALLOWED["convex"] = {"errors", "linalg", "convex"}
ALLOWED["demo"] |= {"report"}
ALLOWED["ship"] |= {"report"}
ALLOWED["tables"] |= {"report", "convex"}
ALLOWED["cli"] |= {"report", "convex"}
ALLOWED[""] = {*ORDER, "report", "convex"}  # lplr/__init__.py: names of every part, imported when used
DOORS = {"transformers": "hf", "huggingface_hub": "hf", "matplotlib": "report", "triton": "kernels", "jinja2": "report"}
DOORS |= {"sklearn": "convex", "prodigyopt": "convex", "scipy": "convex", "lm_eval": "evaluate"}
DOORS |= {"ray": "stream", "peft": "hf", "vllm": "hf", "bitsandbytes": "hf"}
# a head joins a language model and a convex programme: files on each side
JOINTS = {"lplr.convex.heads": {"hf", "stream", "evaluate"}, "lplr.hf.classifier": {"convex"}}
JOINTS |= {"lplr.convex.prune_head": {"hf", "files"}, "lplr.convex.explain": {"hf", "files"}}


def part_of(module: str) -> str:
    """`lplr.stream.source` -> `stream`; `lplr` itself -> ``."""
    return (module.split(".") + [""])[1]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every imported module by its full name, those inside of functions and relative ones too."""
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            source = ".".join(filter(None, (base, node.module)))
            names = [f"{source}.{alias.name}" for alias in node.names] if source == "lplr" else [source]
            yield from ((name, node.lineno) for name in names)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("import_module", "__import__"):
            yield from ((str(arg.value), node.lineno) for arg in node.args[:1] if isinstance(arg, ast.Constant))


def broken(path: Path) -> list[str]:
    """What a file imports against the rule."""
    own, found = part_of(module_name(path)), []
    allowed = ALLOWED[own] | JOINTS.get(module_name(path), set())
    for name, line in imports(path, ast.parse(path.read_text(encoding="utf-8"))):
        top = name.split(".")[0]
        place = f"{path.relative_to(ROOT.parent)}:{line} imports {name}"
        if top in DOORS and DOORS[top] != own:
            found.append(f"{place}, whose one door is lplr/{DOORS[top]}")
        known = top == "lplr" and ((ROOT / part_of(name)).is_dir() or (ROOT / f"{part_of(name)}.py").is_file())
        if known and part_of(name) and part_of(name) not in allowed:
            found.append(f"{place}, which is not to its left")
    return found


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_every_import_goes_to_the_left(path: Path):
    assert part_of(module_name(path)) in ALLOWED, "a part that DESIGN section 3 does not name"
    assert not broken(path)


@pytest.mark.parametrize(
    "text, part",
    [
        ("import transformers", "stream"),
        ("def f():\n    from huggingface_hub import HfApi", "cli"),
        ("from lplr.stream.source import open_source", "hf"),
        ("from ..stream import source", "hf"),
        ("from lplr import stream", "factor"),
        ("from lplr.factor import plan", "report"),
        ("import lplr.nn.swap as swap", "linalg"),
        ("from importlib import import_module\nimport_module('lplr.hf.load')", "quant"),
        ("import matplotlib.pyplot as plt", "evaluate"),
        ("from lplr.recipe import Recipe", "kernels"),
        ("from lplr.hf.load import load_model", "convex"),
        ("from lplr.convex.network import load", "hf"),
        ("import sklearn.base", "evaluate"),
    ],
)
def test_the_walk_sees_what_is_forbidden(text: str, part: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name in (*ORDER, "report", "convex"):
        (tmp_path / "lplr" / name).mkdir(parents=True)
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path / "lplr")
    file = tmp_path / "lplr" / part / "wrong.py"
    file.write_text(text)
    assert len(broken(file)) == 1
    file.write_text("from lplr.errors import LplrError\nimport json")
    assert not broken(file)


def test_no_file_has_a_name_that_says_nothing():
    names = {p.stem for p in ROOT.rglob("*.py")} | {p.name for p in ROOT.rglob("*") if p.is_dir()}
    assert not names & {"utils", "helpers", "common", "misc", "util"}


def test_no_function_is_longer_than_seventy_lines_and_no_file_than_four_hundred():
    for path in ROOT.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 70, f"{path}: {node.name}"
