"""Files of fitted estimators: every bit comes back, foreign and damaged ones are refused."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lplr.convex import Gates, network
from lplr.errors import CheckpointError, OutputError, RecipeError

pytest.importorskip("sklearn")

from sklearn.exceptions import NotFittedError  # noqa: E402

from lplr.convex.estimators import ConvexHeadClassifier, ConvexHeadRegressor  # noqa: E402

SMALL: dict[str, Any] = {"n_gates": 4, "lam": 0.02}
DRAW = np.random.default_rng(0)
X = DRAW.normal(size=(40, 3)) * [1.0, 10.0, 0.1] + 1
NEW = DRAW.normal(size=(25, 3)) * 5
NUMBERS = (X[:, 0] > 1).astype(int) + (X[:, 1] > 4)
FIGURES = ("primal", "dual", "gap", "kkt", "iterations", "seconds", "status", "message")

CLASSES: dict[str, np.ndarray] = {
    "text": np.array(["no", "maybe", "käse"])[NUMBERS],
    "objects": np.array(["no", "maybe", "käse"], dtype=object)[NUMBERS],
    "two of text": np.array(["-", "+"])[NUMBERS.clip(0, 1)],
    "numbers": NUMBERS,
    "odd numbers": np.array([-7, 2**62, 3])[NUMBERS],
    "small numbers": NUMBERS.clip(0, 1).astype(np.uint8),
    "fractions": np.array([1.0, -3.0, 1e15])[NUMBERS],
    "truth": NUMBERS > 0,
}


def written(made: Any, folder: Path) -> Any:
    """What comes back from a file; all that was fitted is compared."""
    made.save(folder / "head")
    again = type(made).load(folder / "head")
    for name in FIGURES:
        assert getattr(again.solution_, name) == getattr(made.solution_, name)
    for name in ("U", "b", "theta"):
        old, new = getattr(made.solution_, name), getattr(again.solution_, name)
        assert old.dtype == new.dtype and torch.equal(old, new)
    for old, new in zip(vars(made.frame_).values(), vars(again.frame_).values(), strict=True):
        assert old == new if isinstance(old, bool) else torch.equal(old, new)
    assert torch.equal(made.gates_.vectors, again.gates_.vectors) and torch.equal(made.gates_.offsets, again.gates_.offsets)
    assert (made.lam_, made.n_features_in_, made.n_iter_) == (again.lam_, again.n_features_in_, again.n_iter_)
    for data in (X, NEW):
        assert np.array_equal(made.predict(data), again.predict(data)) and made.predict(data).dtype == again.predict(data).dtype
        assert torch.equal(made.to_torch()(torch.from_numpy(data)), again.to_torch()(torch.from_numpy(data)))
    for parts in zip(made.to_torch().parameters(), again.to_torch().parameters(), strict=True):
        assert torch.equal(*parts)
    assert again.score(X, made.predict(X)) == 1.0
    assert {k for k in vars(made) if k.endswith("_")} == {k for k in vars(again) if k.endswith("_")}
    assert os.listdir(folder) == ["head"]
    return again


@pytest.mark.parametrize("kind", CLASSES)
def test_classes_of_every_kind(kind, tmp_path):
    y = CLASSES[kind]
    made = ConvexHeadClassifier(**SMALL).fit(X, y)
    again = written(made, tmp_path)
    assert again.classes_.dtype == made.classes_.dtype and again.classes_.tolist() == made.classes_.tolist()
    assert np.array_equal(made.predict_proba(NEW), again.predict_proba(NEW))
    assert np.array_equal(made.decision_function(NEW), again.decision_function(NEW))
    assert again.get_params() == made.get_params()


@pytest.mark.parametrize("options", [
    {"activation": "relu", "lam": 0.1}, {"loss": "squared"}, {"loss": "softmax"}, {"dtype": "float32"}, {"standardize": False},
    {"intercept": False}, {"linear_block": False}, {"gates": "mixed"}, {"lam": 1e6},
    {"lam": np.float32(0.05), "n_gates": np.int64(3)},
])  # fmt: skip
def test_options_of_every_kind(options, tmp_path):
    made = ConvexHeadClassifier(**{**SMALL, **options}).fit(X, NUMBERS > 0)
    assert written(made, tmp_path).get_params() == made.get_params()
    if options.get("loss") == "squared":
        assert not hasattr(ConvexHeadClassifier.load(tmp_path / "head"), "predict_proba")


@pytest.mark.parametrize("outputs", [None, 1, 3])
@pytest.mark.parametrize("activation", ["gated", "relu"])
def test_regressors(outputs, activation, tmp_path):
    y = X @ DRAW.normal(size=(3, outputs or 1)) + np.abs(X[:, :1])
    made = ConvexHeadRegressor(activation=activation, n_gates=3, lam=1.0).fit(X, y if outputs else y[:, 0])
    again = written(made, tmp_path)
    assert again.predict(NEW).shape == ((25, outputs) if outputs else (25,)) and again.n_outputs_ == made.n_outputs_


def test_a_search_is_kept(tmp_path):
    made = ConvexHeadClassifier(n_gates=3, cv=2).fit(X, NUMBERS > 0)
    again = written(made, tmp_path)
    for name, values in made.cv_results_.items():
        assert np.array_equal(again.cv_results_[name], values) and again.cv_results_[name].dtype == values.dtype
    assert again.lam == "cv"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_own_gates(dtype, tmp_path):
    draw = torch.Generator().manual_seed(0)
    gates = Gates(torch.randn(3, 5, generator=draw, dtype=dtype), torch.randn(5, generator=draw, dtype=dtype))
    again = written(ConvexHeadClassifier(gates=gates, lam=0.02).fit(X, NUMBERS), tmp_path)
    assert isinstance(again.gates, Gates) and again.gates.vectors.dtype == dtype
    assert torch.equal(again.gates.vectors, gates.vectors) and torch.equal(again.gates.offsets, gates.offsets)
    first = again.predict_proba(NEW)
    assert np.array_equal(again.fit(X, NUMBERS).predict_proba(NEW), first)  # the parameters are whole


def test_random_generators_are_not_kept(tmp_path):
    made = ConvexHeadClassifier(**SMALL, random_state=np.random.RandomState(3)).fit(X, NUMBERS)
    assert written(made, tmp_path).random_state is None
    made = ConvexHeadClassifier(**SMALL, random_state=np.int64(3)).fit(X, NUMBERS)
    assert written(made, tmp_path).random_state == 3


def test_names_of_features(tmp_path):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(X, columns=["a", "b", "ç"])
    made = ConvexHeadClassifier(**SMALL).fit(frame, NUMBERS)
    made.save(tmp_path / "head")
    again = ConvexHeadClassifier.load(tmp_path / "head")
    assert again.feature_names_in_.tolist() == ["a", "b", "ç"]
    assert np.array_equal(again.predict(frame), made.predict(frame))
    with pytest.raises(ValueError, match="feature names"):
        again.predict(frame.rename(columns={"a": "z"}))


def test_saved_again_it_is_the_same_file_and_a_network_too(tmp_path, monkeypatch):
    for name in ("load", "loads", "dump", "dumps", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, lambda *_, **__: pytest.fail("pickle was used"))
    made = ConvexHeadClassifier(**SMALL).fit(X, NUMBERS > 0)
    made.save(tmp_path / "one")
    ConvexHeadClassifier.load(tmp_path / "one").save(tmp_path / "two")
    one, two = ((tmp_path / name).read_bytes() for name in ("one", "two"))
    ends = [8 + int.from_bytes(raw[:8], "little") for raw in (one, two)]
    assert one[ends[0] :] == two[ends[1] :]
    assert json.loads(one[8 : ends[0]]) == json.loads(two[8 : ends[1]])  # safetensors writes its metadata in any order
    alone = network.load(tmp_path / "one")
    own, x = made.to_torch(), torch.from_numpy(NEW)
    assert all(torch.equal(a, b) for a, b in zip(alone.state_dict().values(), own.state_dict().values(), strict=True))
    assert torch.equal(alone(x), own(x))
    # the estimator has one logit of the three products' sums, the network two: another matrix shape, other last digits on AVX-512
    np.testing.assert_allclose(alone(x).softmax(1).detach().numpy(), made.predict_proba(NEW), rtol=1e-12)


def test_what_cannot_be_stored(tmp_path):
    for made in (ConvexHeadClassifier(), ConvexHeadRegressor()):
        with pytest.raises(NotFittedError):
            made.save(tmp_path / "head")
    fitted = ConvexHeadClassifier(**SMALL).fit(X, NUMBERS)
    with pytest.raises(OutputError, match="cannot be written"):
        fitted.save(tmp_path / "absent" / "head")
    fitted.classes_ = np.array(["2020-01-01", "2020-01-02", "2020-01-03"], dtype="datetime64[D]")
    with pytest.raises(RecipeError, match="classes of type date cannot be stored"):
        fitted.save(tmp_path / "head")
    assert not os.listdir(tmp_path)


def changed(file: Path, target: Path, change: Any) -> Path:
    """The file after change(facts, tensors)."""
    with safe_open(file, framework="pt") as opened:
        told = json.loads(opened.metadata()["lplr.network"])
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    change(told["metadata"], tensors)
    save_file(tensors, target, metadata={"lplr.network": json.dumps(told)})
    return target


CHANGES: dict[str, Any] = {
    "no parameters": lambda facts, tensors: facts.pop("params"),
    "unknown parameter": lambda facts, tensors: facts["params"].update(depth=3),
    "parameters of another type": lambda facts, tensors: facts.update(params=3),
    "no figures": lambda facts, tensors: facts["solution"].pop("gap"),
    "no solution": lambda facts, tensors: facts.update(solution=None),
    "no lam": lambda facts, tensors: facts.pop("lam"),
    "no type of classes": lambda facts, tensors: facts.pop("classes_dtype"),
    "strange type of classes": lambda facts, tensors: facts.update(classes_dtype="<q9"),
    "search of another type": lambda facts, tensors: facts.update(cv_results=[1]),
    "no weights": lambda facts, tensors: tensors.pop("extra.U"),
    "no gates": lambda facts, tensors: tensors.pop("extra.gates.offsets"),
    "half of own gates": lambda facts, tensors: tensors.update({"extra.param.vectors": torch.ones(3, 2)}),
    "weights of another shape": lambda facts, tensors: tensors.update({"extra.U": tensors["extra.U"][:, :-1].clone()}),
    "weights without a shape": lambda facts, tensors: tensors.update({"extra.U": torch.tensor(1.0)}),
    "an offset of another shape": lambda facts, tensors: tensors.update({"extra.b": torch.ones(2, 2)}),
    "gates of another shape": lambda facts, tensors: tensors.update({"extra.gates.vectors": torch.ones(2, 2)}),
    "a mean of another shape": lambda facts, tensors: tensors.update({"extra.frame.mean": torch.ones(7)}),
    "no scale": lambda facts, tensors: tensors.update({"extra.frame.scale": torch.zeros(3)}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_damaged_files_are_refused(change, tmp_path):
    ConvexHeadClassifier(**SMALL).fit(X, NUMBERS).save(tmp_path / "head")
    changed(tmp_path / "head", tmp_path / "other", lambda *_: None)
    ConvexHeadClassifier.load(tmp_path / "other")
    with pytest.raises(CheckpointError, match="save the estimator again"):
        ConvexHeadClassifier.load(changed(tmp_path / "head", tmp_path / "other", CHANGES[change]))


def test_foreign_files_are_refused(tmp_path):
    made = ConvexHeadClassifier(**SMALL).fit(X, NUMBERS)
    made.save(tmp_path / "head")
    with pytest.raises(CheckpointError, match="holds ConvexHeadClassifier, not ConvexHeadRegressor"):
        ConvexHeadRegressor.load(tmp_path / "head")
    network.save(made.to_torch(), tmp_path / "network")
    with pytest.raises(CheckpointError, match="holds a network alone"):
        ConvexHeadClassifier.load(tmp_path / "network")
    (tmp_path / "pickled").write_bytes(pickle.dumps(made))
    (tmp_path / "cut").write_bytes((tmp_path / "head").read_bytes()[:-100])
    save_file({"x": torch.ones(2)}, tmp_path / "tensors")
    for name in ("pickled", "cut", "tensors", "absent", "."):
        with pytest.raises(CheckpointError):
            ConvexHeadClassifier.load(tmp_path / name)
