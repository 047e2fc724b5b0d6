"""Heads on language models: fitted, stored, loaded by transformers, evaluated, fitted again after compression."""

from __future__ import annotations

import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from runs import run, settings
from typer.testing import CliRunner

import lplr
from lplr.errors import CheckpointError, DatasetError, LplrError, OutputError, RecipeError
from lplr.stream.verify import verify

pytest.importorskip("sklearn")

from lplr.cli import app  # noqa: E402
from lplr.convex.heads import FACTS, fit_head  # noqa: E402
from lplr.evaluate.classification import evaluate_head  # noqa: E402
from lplr.hf.classifier import HeadModel, is_head  # noqa: E402

SMALL: dict[str, Any] = {"n_gates": 6, "seqlen": 16}


def labelled(file: Path, count: int, seed: int = 0, classes: tuple[str, ...] = ("bad", "good")) -> str:
    """Texts whose class tells which words are likely in them."""
    draw = random.Random(seed)
    lines = []
    for _ in range(count):
        c = draw.randrange(len(classes))
        words = [f"w{draw.randrange(10) + 10 * c if draw.random() < 0.7 else draw.randrange(60)}" for _ in range(8)]
        lines.append(json.dumps({"text": " ".join(words), "label": classes[c]}))
    file.write_text("\n".join(lines) + "\n")
    return str(file)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("model")
    run(settings(checkpoints.write(root / "base", "llama")), root / "out")
    return root / "out"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("texts")
    return labelled(root / "train.jsonl", 120), labelled(root / "test.jsonl", 60, 1)


@pytest.mark.parametrize("activation, pooling", [("gated", "mean"), ("gated", "last"), ("relu", "attention")])
def test_a_head_is_a_sequence_classification_model(
    activation: str, pooling: str, folder: Path, texts: tuple[str, str], tmp_path: Path
):
    train, test = texts
    target = folder / "heads" / f"{activation}-{pooling}"
    chosen = {**SMALL, "lam": 0.02 if activation == "relu" else "cv"}
    found = fit_head(str(folder), train, held_out=test, activation=activation, pooling=pooling, output=target, **chosen)
    assert found.status == "converged" and found.relative_gap <= 1e-4
    assert found.accuracy > 0.65 and found.samples == 120 and found.held_out_samples == 60 and found.classes == ["bad", "good"]
    measured = evaluate_head(str(target), test)
    assert (measured.accuracy, measured.samples) == (found.accuracy, 60) and measured.nll == pytest.approx(found.nll, rel=1e-5)
    assert is_head(target) and not is_head(folder)
    verify(folder)  # a head is no change of the model
    from transformers import AutoModelForSequenceClassification, pipeline

    model = AutoModelForSequenceClassification.from_pretrained(target)
    assert type(model) is HeadModel and model.config.id2label == {0: "bad", 1: "good"} and not model.training
    tokenizer = lplr.load_tokenizer(target)
    lines = [json.loads(line) for line in Path(test).read_text().splitlines()]
    tokens = tokenizer([line["text"] for line in lines], padding=True, return_tensors="pt")
    kept = {k: v for k, v in tokens.items() if k != "token_type_ids"}
    with torch.no_grad():
        out = model(**kept, labels=torch.tensor([["bad", "good"].index(line["label"]) for line in lines]))
        plain = model(**kept, return_dict=False)
    assert torch.equal(plain[0], out.logits) and float(out.loss) == pytest.approx(found.nll, rel=1e-5)
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer)
    said = classify(lines[0]["text"])[0]
    assert said["label"] == model.config.id2label[int(out.logits[0].argmax())]
    assert said["score"] == pytest.approx(float(out.logits[0].softmax(0).max()), rel=1e-5)
    model.save_pretrained(folder / "heads" / "again")
    assert torch.equal(HeadModel.from_pretrained(folder / "heads" / "again")(**kept).logits, out.logits)
    shutil.rmtree(folder / "heads" / "again")


def test_a_head_is_fitted_again_to_another_model_without_a_search(folder: Path, texts: tuple[str, str], tmp_path: Path):
    train, _ = texts
    first = fit_head(str(folder), train, **SMALL)
    assert first.held_out == "20% of it" and (first.samples, first.held_out_samples) == (96, 24)
    target = Path(first.folder)
    assert target.parent == folder / "heads" and target.is_dir()
    run(settings(folder.parent / "base", bits=6), tmp_path / "other")
    again = fit_head(str(tmp_path / "other"), train, like=target)
    odd = fit_head(str(folder), train, seed=5, output=tmp_path / "odd", **SMALL)
    like = fit_head(str(folder), train, like=tmp_path / "odd", output=tmp_path / "like")  # its seed, so its held-out texts
    assert (like.accuracy, like.probe_nll) == (odd.accuracy, odd.probe_nll)
    assert again.lam == first.lam and again.settings == first.settings
    assert Path(again.folder) == tmp_path / "other" / "heads" / target.name
    same = fit_head(str(folder), train, **SMALL)  # takes the place of the first, from cached features
    assert {**vars(same), "seconds_features": 0, "seconds_fit": 0} == {**vars(first), "seconds_features": 0, "seconds_fit": 0}


def test_many_classes_and_the_command(folder: Path, tmp_path: Path):
    train = labelled(tmp_path / "three.jsonl", 150, classes=("a", "b", "c"))
    given = ["fit-head", str(folder), "--dataset", train, "--gates", "5", "--seqlen", "16", "--lam", "0.01"]
    done = CliRunner().invoke(app, [*given, "-o", str(tmp_path / "head")])
    assert done.exit_code == 0, done.output
    assert "a, b, c" in done.output and "linear probe" in done.output
    facts = json.loads((tmp_path / "head" / FACTS).read_text())
    assert facts["lam"] == 0.01 and facts["relative_gap"] <= 1e-4
    done = CliRunner().invoke(app, ["eval", str(tmp_path / "head"), "--dataset", train])
    assert done.exit_code == 0 and "calibration error" in done.output
    kept = json.loads((tmp_path / "head" / "eval-three.jsonl.json").read_text())
    assert kept["samples"] == 150 and kept["accuracy"] > 0.5
    two = labelled(tmp_path / "two.jsonl", 10)
    with pytest.raises(DatasetError, match="label 'bad' is none of"):
        evaluate_head(str(tmp_path / "head"), two)
    assert CliRunner().invoke(app, [*given[:-1], "much"]).exit_code == 2


def test_what_cannot_be_fitted_is_refused(folder: Path, texts: tuple[str, str], tmp_path: Path):
    train, test = texts
    one = labelled(tmp_path / "one.jsonl", 5, classes=("only",))
    three = labelled(tmp_path / "three.jsonl", 20, classes=("a", "b", "c"))
    (tmp_path / "taken").mkdir()
    cases: list[tuple[type[LplrError], str, str, str, dict[str, Any]]] = [
        (CheckpointError, "no folder of a model", str(tmp_path), train, {}),
        (DatasetError, "every label is 'only'", str(folder), one, {}),
        (DatasetError, "label 'a' is none of", str(folder), train, {"held_out": three}),
        (DatasetError, "too few to hold some out", str(folder), train, {"limit": 4}),
        (OutputError, "exists and is no head", str(folder), train, {"output": tmp_path / "taken"}),
        (RecipeError, "did you mean 'mean'", str(folder), train, {"pooling": "meen"}),
        (RecipeError, "unknown activation", str(folder), train, {"activation": "tanh", **SMALL}),
        (RecipeError, "lam is", str(folder), train, {"lam": -1.0, **SMALL}),
        (RecipeError, "holds no head.json", str(folder), train, {"like": tmp_path}),
    ]
    for kind, message, model, dataset, more in cases:
        with pytest.raises(kind, match=message):
            fit_head(model, dataset, **more)
    assert not any(p.name.startswith(".one") or p.name.startswith(".train-") for p in (folder / "heads").iterdir())


def test_without_scikit_learn_it_says_what_to_install(folder: Path, texts: tuple[str, str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "lplr.convex.estimators", None)
    monkeypatch.delattr("lplr.convex.estimators", raising=False)
    with pytest.raises(RecipeError, match=r"needs the package .*: pip install 'lplr\[convex\]'"):
        fit_head(str(folder), texts[0])


def test_a_head_away_from_its_model_says_so(folder: Path, texts: tuple[str, str], tmp_path: Path):
    found = fit_head(str(folder), texts[0], lam=0.05, output=tmp_path / "a" / "head", **SMALL)
    moved = tmp_path / "deep" / "er" / "head"
    shutil.copytree(found.folder, moved)
    with pytest.raises(CheckpointError, match="language model of .* is not there"):
        HeadModel.from_pretrained(moved)
    with pytest.raises(CheckpointError, match="has no model.safetensors"):
        HeadModel.from_pretrained(tmp_path)
