"""The estimators: scikit-learn's contract, the exported network, Clarabel, LogisticRegression, and what bad input is answered."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from convex.oracles import optimum
from hypothesis import given, settings
from hypothesis import strategies as st

from lplr.convex import Gates, Penalty, Problem, lambda_max, network
from lplr.errors import RecipeError

pytest.importorskip("sklearn")

from sklearn.base import clone  # noqa: E402
from sklearn.exceptions import ConvergenceWarning, NotFittedError  # noqa: E402
from sklearn.linear_model import LogisticRegression  # noqa: E402
from sklearn.metrics import log_loss  # noqa: E402
from sklearn.model_selection import GridSearchCV, cross_val_score  # noqa: E402
from sklearn.utils.estimator_checks import check_estimator  # noqa: E402

from lplr.convex import estimators as module  # noqa: E402
from lplr.convex.estimators import ConvexHeadClassifier, ConvexHeadRegressor, linear_probe  # noqa: E402

SMALL: dict[str, Any] = {"n_gates": 4, "lam": 0.02}
KINDS = ("gaussian", "data", "mixed", "wedge")


def data(seed: int = 0, n: int = 40, d: int = 3, classes: int = 2) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Samples of unlike scales, the last column constant but for rounding; class numbers; other samples, where it is not."""
    draw = np.random.default_rng(seed)
    X = draw.normal(size=(n, d)) * 10.0 ** np.arange(-1, d - 1) + 1
    X[:, -1] = 0.3
    X[::2, -1] = 0.1 + 0.2
    numbers = (X[:, 0] + 0.1 * draw.normal(size=n) > 1).astype(int) + (np.abs(X[:, 1] - 1) > 0.7) * (classes > 2)
    return X, numbers, draw.normal(size=(25, d)) * 10.0 ** np.arange(-1, d - 1) * 3


def standardised(X: np.ndarray, to: np.ndarray, made: Any) -> np.ndarray:
    """The programme's features of `to`, fitted on X, written once more."""
    F = np.zeros_like(to)
    for k in range(X.shape[1]):
        if not made.standardize:
            F[:, k] = to[:, k]
        elif X[:, k].std() > 1e-12 * np.abs(X[:, k]).max():
            F[:, k] = (to[:, k] - X[:, k].mean()) / X[:, k].std()
    return np.concatenate([F, np.ones((len(to), 1))], 1) if made.intercept else F


def outputs(made: Any, X: np.ndarray, to: np.ndarray) -> np.ndarray:
    """The sum of gated linear maps, or of ReLU neurons, of the solution."""
    F, U, b = standardised(X, to, made), made.solution_.U.double().numpy(), made.solution_.b.double().numpy()
    if made.activation == "relu":
        products = np.einsum("nd,sidc->nsic", F, U).clip(0)
        return (products[:, 0] - products[:, 1]).sum(1) + b
    opened = to @ made.gates_.vectors.numpy() + made.gates_.offsets.numpy() > 0
    return np.einsum("ni,nd,idc->nc", opened, F, U) + b


def softmax(Z: np.ndarray) -> np.ndarray:
    Z = np.exp(Z - Z.max(1, keepdims=True))
    return Z / Z.sum(1, keepdims=True)


# scikit-learn's contract


@pytest.mark.parametrize("made", [
    ConvexHeadClassifier(),
    ConvexHeadRegressor(),
    ConvexHeadClassifier(n_gates=4, lam=0.05, gates="data", dtype="float32", tol=1e-3, norm="columns", intercept=False),
    ConvexHeadClassifier(n_gates=4, lam=0.01, loss="squared", gates="mixed", standardize=False),
    ConvexHeadRegressor(n_gates=4, lam=0.1, linear_block=False),
    ConvexHeadClassifier(activation="relu", loss="squared", n_gates=1, lam=0.1, tol=3e-2),
    ConvexHeadRegressor(activation="relu", gates="data", n_gates=1, lam=0.1, tol=3e-2),
], ids=str)  # fmt: skip
def test_the_checks_of_scikit_learn(monkeypatch, made):
    """Of the defaults' grid of 20 penalties two are tried: the others are only more of the same."""
    monkeypatch.setattr(module, "CV_STEPS", 2)
    monkeypatch.setattr(module, "CV_RATIO", 0.4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = check_estimator(made, on_skip=None, on_fail="raise")
    skipped = {check["check_name"] for check in found if check["status"] == "skipped"}
    assert len(found) > 50 and skipped <= {"check_array_api_input"}  # which needs SCIPY_ARRAY_API=1 before scipy is imported


@pytest.mark.parametrize("kind", [ConvexHeadClassifier, ConvexHeadRegressor])
def test_read_only_samples(kind):
    """Torch warns of them once a process, so whether a warning is seen depends on what ran before."""
    torch.set_warn_always(True)
    try:
        X, y, new = data()
        for array in (X, y, new):
            array.flags.writeable = False
        made, plain = kind(**SMALL).fit(X, y), kind(**SMALL).fit(X.copy(), y.copy())
        np.testing.assert_array_equal(made.predict(new), plain.predict(new.copy()))
        np.testing.assert_array_equal(made.predict(np.asfortranarray(new)[::-1]), plain.predict(new.copy()[::-1]))
    finally:
        torch.set_warn_always(False)


def test_a_part_of_a_search():
    X, y, _ = data()
    search = GridSearchCV(ConvexHeadClassifier(**SMALL), {"lam": [0.01, 0.1], "activation": ["gated"]}, cv=2).fit(X, y)
    assert search.best_score_ > 0.7 and search.best_estimator_.score(X, y) > 0.8
    assert len(cross_val_score(ConvexHeadRegressor(**SMALL), X, X[:, 0], cv=3)) == 3
    own = ConvexHeadClassifier(gates=Gates(torch.ones(3, 1), torch.ones(1)), lam=0.1)
    assert torch.equal(clone(own).gates.vectors, own.gates.vectors) and "ConvexHeadClassifier" in repr(own)


# Networks


GATED = [
    (kind, intercept, linear, standard, classes)
    for kind, (intercept, linear, standard), classes in itertools.product(
        KINDS, itertools.product((False, True), repeat=3), (2, 3)
    )
]
RELU = [
    ("gaussian", True, True, True, 2), ("data", False, False, True, 3), ("mixed", True, False, False, 2),
    ("gaussian", False, True, False, 2), ("data", True, True, True, 3),
]  # fmt: skip


@pytest.mark.parametrize(
    "activation, kind, intercept, linear, standard, classes", [("gated", *g) for g in GATED] + [("relu", *r) for r in RELU]
)
def test_classes_are_those_of_the_network(activation, kind, intercept, linear, standard, classes):
    X, numbers, new = data(1, n=30, classes=classes)
    labels = np.array(["b", "a", "c"])[numbers]
    made = ConvexHeadClassifier(
        activation=activation, gates=kind, intercept=intercept, linear_block=linear, standardize=standard, n_gates=4, tol=1e-5,
        lam=0.02 if activation == "relu" and standard else 0.01 if standard else 0.002,
    ).fit(X, labels)  # fmt: skip
    alone = made.to_torch()
    assert isinstance(alone, torch.nn.Module) and made.solution_.converged and made.solution_.U.any()
    assert made.classes_.tolist() == sorted(set(labels)) and made.n_features_in_ == 3
    for samples in (X, new):
        logits = alone(torch.from_numpy(samples)).detach().numpy()
        Z = made.decision_function(samples)
        assert logits.shape == (len(samples), classes) and Z.shape == ((len(samples), 3) if classes == 3 else (len(samples),))
        difference = logits - Z if classes == 3 else logits[:, 1] - logits[:, 0] - Z
        assert np.abs(difference).max() < 1e-6
        assert np.abs(softmax(logits) - made.predict_proba(samples)).max() < 1e-6
        assert made.predict(samples).tolist() == made.classes_[logits.argmax(1)].tolist()
        if standard or samples is X:  # a constant column that varies elsewhere is seen only as it is
            wanted = outputs(made, X, samples)
            assert np.abs((Z if classes == 3 else Z[:, None]) - wanted).max() < 1e-9 * (1 + np.abs(wanted).max())
    # outputs of the training samples are those of the programme; in cones to the solver's 1e-8
    D, Y = made.gates_.patterns(torch.from_numpy(X)), torch.ones(30, 1, dtype=torch.float64)
    problem = Problem(torch.from_numpy(standardised(X, X, made)), Y, D)
    U = made.solution_.U if activation == "gated" else made.solution_.U[0] - made.solution_.U[1]
    fits = problem.fit(U, made.solution_.b).numpy()
    assert np.abs(made.decision_function(X) - (fits if classes == 3 else fits[:, 0])).max() < 1e-6


@pytest.mark.parametrize("activation", ["gated", "relu"])
@pytest.mark.parametrize("targets", [None, 1, 3])
@pytest.mark.parametrize("intercept, standard", [(True, True), (False, False), (False, True)])
def test_targets_are_those_of_the_network(activation, targets, intercept, standard):
    X, _, new = data(2, n=25)
    y = np.maximum(X[:, 1:2], 1) @ np.ones((1, targets or 1)) + X[:, 1:2] * np.arange(targets or 1) + 3
    made = ConvexHeadRegressor(activation=activation, n_gates=3, lam=0.02, intercept=intercept, standardize=standard)
    made.fit(X, y if targets else y[:, 0])
    assert made.solution_.U.any()
    for samples in (X, new):
        found, alone = made.predict(samples), made.to_torch()(torch.from_numpy(samples)).detach().numpy()
        assert found.shape == ((len(samples), targets) if targets else (len(samples),))
        assert alone.shape == (len(samples), targets or 1)
        assert np.abs(found - (alone if targets else alone[:, 0])).max() < 1e-6
        if standard or samples is X:
            assert np.abs(alone - outputs(made, X, samples)).max() < 1e-9 * (1 + np.abs(alone).max())
    assert not intercept or made.score(X, y if targets else y[:, 0]) > 0.8


@given(seed=st.integers(0, 999), kind=st.sampled_from(KINDS), step=st.sampled_from([1.0, 0.1, 1 / 3]), classes=st.integers(2, 3))
@settings(max_examples=15, deadline=None)
def test_samples_on_a_grid_of_values(seed, kind, step, classes):
    """Hyperplanes through samples would be on either side by rounding: the network's fit is the programme's all the same."""
    draw = np.random.default_rng(seed)
    X = draw.integers(-2, 3, size=(30, 2)) * step
    y = np.abs(draw.permutation(30)) % classes
    made = ConvexHeadClassifier(gates=kind, n_gates=6, lam=0.01).fit(X, y)
    assert np.abs(made.decision_function(X) - outputs(made, X, X).squeeze()).max() < 1e-9
    alone = made.to_torch()(torch.from_numpy(X)).detach().numpy()
    loss = made.solution_.primal - Penalty(made.lam_).value(made.solution_.U)
    assert log_loss(y, softmax(alone), labels=range(classes)) == pytest.approx(loss, rel=1e-7)


def test_single_precision_fits_the_same():
    X, y, new = data()
    made = [ConvexHeadClassifier(n_gates=4, lam=0.05, dtype=dtype, tol=1e-5).fit(X, y) for dtype in ("float32", "float64")]
    single, double = made
    assert single.solution_.U.dtype == torch.float32 and single.to_torch()(torch.from_numpy(X)).dtype == torch.float64
    assert single.solution_.primal == pytest.approx(double.solution_.primal, rel=3e-5)
    assert np.abs(single.decision_function(new) - single.to_torch()(torch.from_numpy(new)).detach().numpy()[:, 1]).max() < 1e-6


def test_a_network_of_its_own():
    X, y, new = data()
    made = ConvexHeadClassifier(**SMALL).fit(X, y)
    before = made.predict_proba(new)
    with torch.no_grad():
        for parameter in made.to_torch().parameters():
            parameter.fill_(7)
    assert np.array_equal(made.predict_proba(new), before)
    assert isinstance(made.network_, network.GatedNetwork) and made.network_.shape[2] == 1


def test_many_samples_are_predicted_in_parts(monkeypatch):
    X, y, new = data()
    made = ConvexHeadClassifier(**SMALL).fit(X, y)
    whole = made.decision_function(new)
    monkeypatch.setattr(module, "ROWS", 7)
    assert np.allclose(made.decision_function(new), whole, rtol=1e-13)


# What is optimal


@pytest.mark.parametrize("loss, classes, norm, activation, intercept", [
    ("auto", 2, "auto", "gated", True), ("auto", 3, "auto", "gated", True), ("softmax", 2, "columns", "gated", False),
    ("squared", 2, "auto", "gated", True), ("squared", 3, "nuclear", "gated", True), ("auto", 2, "auto", "relu", True),
    ("auto", 3, "auto", "relu", False),
])  # fmt: skip
def test_the_optimum_on_standardised_samples(loss, classes, norm, activation, intercept):
    X, y, _ = data(3, n=20, d=3, classes=classes)
    made = ConvexHeadClassifier(loss=loss, norm=norm, activation=activation, intercept=intercept, n_gates=3, lam=0.03, tol=1e-6)
    made.fit(X, y)
    hot = np.eye(classes)[y]
    if loss == "auto":
        loss = "logistic" if classes == 2 else "softmax"
    Y = hot if loss == "softmax" or classes > 2 else hot[:, 1:] * 2 - 1
    D = torch.from_numpy(X @ made.gates_.vectors.numpy() + made.gates_.offsets.numpy() > 0)
    problem = Problem(torch.from_numpy(standardised(X, X, made)), torch.from_numpy(Y), D, loss, activation, intercept)
    penalty = Penalty(0.03, {"relu": "columns", "gated": "group"}[activation] if norm == "auto" else norm)
    assert made.solution_.primal == pytest.approx(optimum(problem, penalty), rel=3e-6)  # both to 1e-6
    if activation == "gated" or intercept:
        assert bool(D[:, 0].all())  # the linear block


@pytest.mark.parametrize("lam", [0.01, 0.003])
def test_with_the_linear_block_alone_it_is_logistic_regression(lam):
    """lam ||w|| and ||w||^2 / (2 C n) have one gradient where C = ||w|| / (n lam): then both have one optimum."""
    X, y, new = data(4, n=60)
    X, new = X[:, :2], new[:, :2]
    only = Gates(torch.zeros(2, 1), torch.ones(1))
    made = ConvexHeadClassifier(gates=only, lam=lam, tol=1e-10, standardize=False).fit(X, y)
    w = made.solution_.U[0, :, 0].numpy()
    assert w[-1] == pytest.approx(0, abs=1e-4)  # the penalised bias has no use beside the free one
    twin = LogisticRegression(C=np.linalg.norm(w) / (len(X) * lam), tol=1e-10, max_iter=10_000).fit(X, y)
    assert twin.coef_[0] == pytest.approx(w[:2], rel=1e-3, abs=1e-3)
    Z = made.decision_function(new)
    assert np.abs(twin.decision_function(new) - Z).max() < 1e-2 * np.abs(Z).max()


@pytest.mark.parametrize("n_gates", [1, 8])
@pytest.mark.parametrize("lam", [0.2, 0.02, 0.002])
def test_it_contains_the_linear_probe(n_gates, lam):
    X, y, _ = data(5, n=60)
    made = ConvexHeadClassifier(n_gates=n_gates, lam=lam, tol=1e-6).fit(X, y)
    S = standardised(X, X, made)[:, :2]
    for C in np.logspace(-4, 3, 15):
        probe = LogisticRegression(C=C, max_iter=10_000).fit(S, y)
        objective = log_loss(y, probe.predict_proba(S)) + lam * np.linalg.norm(probe.coef_)
        assert made.solution_.primal <= objective * (1 + 1e-6)


def test_a_huge_penalty_predicts_the_prior():
    X, y, new = data(6, n=30, classes=3)
    for numbers in (y, y.clip(0, 1)):
        made = ConvexHeadClassifier(lam=1e6, n_gates=3).fit(X, numbers)
        prior = np.bincount(numbers) / 30
        assert np.abs(made.predict_proba(new) - prior).max() < 1e-7 and (made.predict(new) == prior.argmax()).all()
        assert made.solution_.converged and "at least lambda_max, so no gate is active: lower lam" in made.solution_.message
    targets = np.stack([X[:, 0], y], 1)
    made = ConvexHeadRegressor(lam=1e9, n_gates=3).fit(X, targets)
    assert np.abs(made.predict(new) - targets.mean(0)).max() < 1e-12 and "lambda_max" in made.solution_.message
    made = ConvexHeadClassifier(lam=1e6, n_gates=3, intercept=False).fit(X, y.clip(0, 1))
    assert (made.predict_proba(new) == 0.5).all()


def test_a_search_picks_from_the_grid():
    X, y, _ = data(7, n=60)
    made = ConvexHeadClassifier(n_gates=5, cv=3).fit(X, y)
    found = made.cv_results_
    steps = len(found["lam"])
    assert made.lam_ == found["lam"][found["mean_loss"].argmin()] and found["split_losses"].shape == (steps, 3) and steps <= 20
    assert np.abs(found["split_losses"].mean(1) - found["mean_loss"]).max() < 1e-12  # folds of 20 samples each
    D = made.gates_.patterns(torch.from_numpy(X))
    Y = torch.from_numpy(2.0 * y[:, None] - 1)
    problem = Problem(torch.from_numpy(standardised(X, X, made)), Y, D, "logistic", intercept=True)
    assert found["lam"][0] == pytest.approx(lambda_max(problem, "group"), rel=1e-9)
    assert found["lam"][:-1] / found["lam"][1:] == pytest.approx(np.full(steps - 1, 1e3 ** (1 / 19)), rel=1e-9)
    assert found["mean_loss"][0] == pytest.approx(-np.mean(np.log(np.where(y, y.mean(), 1 - y.mean()))), rel=0.02)
    assert found["mean_loss"].min() < 0.7 * found["mean_loss"][0]
    assert made.solution_.primal == pytest.approx(optimum(problem, Penalty(made.lam_)), rel=1e-4 + 1e-6)  # its tol
    made.set_params(lam=0.1).fit(X, y)
    assert made.lam_ == 0.1 and not hasattr(made, "cv_results_")


def test_a_search_for_relu_on_many_data_takes_the_share_of_the_gated_programme(monkeypatch):
    X, y, _ = data(3)
    monkeypatch.setattr(module, "CONES", 0)
    options = {"n_gates": 3, "cv": 2, "norm": "columns", "random_state": 1}
    made, gated = (ConvexHeadClassifier(activation=kind, **options).fit(X, y) for kind in ("relu", "gated"))
    assert torch.equal(made.gates_.vectors, gated.gates_.vectors)
    shares = []
    for head, activation in ((made, "relu"), (gated, "gated")):
        F = torch.from_numpy(standardised(X, X, head))
        D, Y = head.gates_.patterns(torch.from_numpy(X)), torch.from_numpy(2.0 * y[:, None] - 1)
        shares.append(head.lam_ / lambda_max(Problem(F, Y, D, "logistic", activation, True), "columns"))
    assert shares[0] == pytest.approx(shares[1], rel=1e-5)  # the walk is in float32
    assert made.cv_results_["lam"].max() == pytest.approx(made.lam_ / shares[0], rel=1e-5)
    assert made.solution_.U.ndim == 4 and made.solution_.converged


@pytest.mark.parametrize("lam", ["cv", 0.05])
def test_the_callback_is_told_of_every_step(lam):
    X, y, _ = data(4)
    told: list[tuple[float, float, str]] = []
    made = ConvexHeadClassifier(n_gates=3, cv=2, lam=lam, callback=lambda *step: told.append(step)).fit(X, y)
    steps = len(made.cv_results_["lam"]) if lam == "cv" else 0
    assert len(told) == steps + 1 + (lam == "cv") and told[-1][2] == "fitting all samples"
    assert all(0 <= done < total for done, total, _ in told) and [d for d, *_ in told] == sorted(d for d, *_ in told)


def test_a_search_with_many_features_and_one_of_several_targets():
    draw = np.random.default_rng(0)
    X = draw.normal(size=(24, 60))
    made = ConvexHeadRegressor(n_gates=3, cv=3).fit(X, X[:, :2] * 3)
    assert made.lam_ in made.cv_results_["lam"] and made.solution_.converged and made.predict(X).shape == (24, 2)
    constant = ConvexHeadRegressor(n_gates=3).fit(X, np.full(24, 2.5))
    assert not hasattr(constant, "cv_results_") and np.abs(constant.predict(X) - 2.5).max() < 1e-12
    rare = ConvexHeadClassifier(n_gates=3, cv=2).fit(X, np.arange(24) // 23 + (np.arange(24) > 10))  # one class of one sample
    assert rare.cv_results_["split_losses"].shape[1] == 2 and rare.classes_.tolist() == [0, 1, 2]


def test_a_path_is_that_of_the_fits():
    X, y, _ = data(8)
    made = ConvexHeadClassifier(n_gates=4, tol=1e-6)
    found = made.path(X, y, steps=4, ratio=0.05)
    assert vars(made) == vars(ConvexHeadClassifier(n_gates=4, tol=1e-6)) and len(found) == 4
    for lam, one in found:
        alone = ConvexHeadClassifier(n_gates=4, tol=1e-6, lam=lam).fit(X, y)
        assert one.converged and one.primal == pytest.approx(alone.solution_.primal, rel=2e-6)
    with pytest.raises(RecipeError, match="ratio"):
        made.path(X, y, ratio=2.0)


def test_randomness_is_an_argument():
    X, y, _ = data()
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    one, same, other = (ConvexHeadClassifier(**SMALL, random_state=seed).fit(X, y) for seed in (1, np.random.RandomState(1), 2))
    assert torch.equal(one.gates_.vectors, same.gates_.vectors) and not torch.equal(one.gates_.vectors, other.gates_.vectors)
    assert torch.equal(state[0], torch.get_rng_state()) and np.array_equal(state[1], np.random.get_state()[1])
    again = ConvexHeadClassifier(gates=one.gates_, lam=SMALL["lam"]).fit(X, y)
    assert again.solution_.primal == one.solution_.primal


# What is answered


GATES = Gates(torch.ones(3, 2, dtype=torch.float64), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("options, message", [
    ({"activation": "rleu"}, "unknown activation 'rleu': choose one of gated, relu; did you mean 'relu'"),
    ({"gates": "gausian"}, "unknown gates 'gausian'.*did you mean 'gaussian'"),
    ({"norm": "frobenius"}, "unknown norm 'frobenius'"),
    ({"norm": "frobenius", "lam": "cv"}, "unknown norm 'frobenius'"),
    ({"method": "adam"}, "unknown method 'adam'"),
    ({"dtype": "float16"}, "unknown dtype 'float16': choose one of float64, float32"),
    ({"lam": "vc"}, "lam is 'vc': give a positive number, or 'cv'"),
    ({"lam": None}, "lam is None"),
    ({"lam": [0.1]}, r"lam is \[0.1\]"),
    ({"lam": 0.0}, "lam is 0.0: give a positive number"),
    ({"lam": float("nan")}, "lam is nan"),
    ({"tol": 0.0}, "tol is 0.0"),
    ({"max_iter": -1}, "max_iter is -1"),
    ({"n_gates": 0}, "n_gates is 0: give a whole number"),
    ({"n_gates": 2.5}, "n_gates is 2.5"),
    ({"lam": "cv", "cv": 1}, "1 folds: cross-validation needs at least 2"),
    ({"lam": "cv", "cv": 2.5}, "cv is 2.5"),
    ({"gates": Gates(GATES.vectors[:2], GATES.offsets)}, r"vectors \(2, 2\).*X has 3 features: give vectors \(3, P\)"),
    ({"gates": Gates(GATES.vectors, GATES.offsets[:1])}, r"offsets \(1,\)"),
    ({"gates": Gates(GATES.vectors[:, 0], GATES.offsets)}, r"vectors \(3,\)"),
    ({"gates": Gates(GATES.vectors[:, :0], GATES.offsets[:0])}, "no gates"),
    ({"activation": "relu", "norm": "nuclear"}, "use norm='columns'"),
])  # fmt: skip
@pytest.mark.parametrize("kind", [ConvexHeadClassifier, ConvexHeadRegressor])
def test_settings_out_of_range(kind, options, message):
    X, y, _ = data(classes=3)
    target = y if kind is ConvexHeadClassifier else np.stack([y, y], 1).astype(float)
    with pytest.raises(RecipeError, match=message):
        kind(**{**SMALL, **options}).fit(X, target)


def test_losses_that_do_not_fit_the_classes():
    X, y, _ = data(classes=3)
    with pytest.raises(RecipeError, match="did you mean 'logistic'"):
        ConvexHeadClassifier(loss="logistc").fit(X, y)
    with pytest.raises(RecipeError, match="loss 'logistic' is for two classes, y holds 3: use 'softmax'"):
        ConvexHeadClassifier(loss="logistic").fit(X, y)
    assert not hasattr(ConvexHeadClassifier(loss="squared"), "predict_proba")


@pytest.mark.parametrize("kind", [ConvexHeadClassifier, ConvexHeadRegressor])
def test_samples_that_cannot_be_fitted(kind):
    X, y, new = data()
    for bad in (np.nan, np.inf):
        broken = X.copy()
        broken[3, 1] = bad
        with pytest.raises(ValueError, match="NaN|infinity"):
            kind(**SMALL).fit(broken, y)
        with pytest.raises(ValueError, match="NaN|infinity"):
            kind(**SMALL).fit(X, y).predict(broken)
    with pytest.raises(ValueError, match="NaN"):
        kind(**SMALL).fit(X, np.where(y > 0, y, np.nan))
    with pytest.raises(ValueError, match="0 sample"):
        kind(**SMALL).fit(X[:0], y[:0])
    with pytest.raises(ValueError, match="0 feature"):
        kind(**SMALL).fit(X[:, :0], y)
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        kind(**SMALL).fit(X, y[:-1])
    with pytest.raises(ValueError, match="2 features"):
        kind(**SMALL).fit(X, y).predict(new[:, :2])
    for call in ("predict", "to_torch"):
        with pytest.raises(NotFittedError):
            getattr(kind(), call)(*[new][: call == "predict"])


def test_targets_that_cannot_be_fitted():
    X, y, _ = data()
    with pytest.raises(RecipeError, match="y holds one class, 'only': a classifier needs samples of two classes"):
        ConvexHeadClassifier(**SMALL).fit(X, ["only"] * 40)
    with pytest.raises(ValueError, match="[Uu]nknown label type"):
        ConvexHeadClassifier(**SMALL).fit(X, X[:, 0])
    with pytest.raises(RecipeError, match="one class"):
        ConvexHeadClassifier(**SMALL).fit(X[:1], y[:1])
    with pytest.raises(RecipeError, match="n_samples = 2 with no two of a class: cross-validation needs more"):
        ConvexHeadClassifier().fit(X[:2], [0, 1])
    with pytest.raises(RecipeError, match="n_samples = 1.*give a number for lam"):
        ConvexHeadRegressor().fit(X[:1], [3.0])


@pytest.mark.parametrize("activation", ["gated", "relu"])
def test_the_fewest_samples(activation):
    X, _, new = data()
    one = ConvexHeadRegressor(**SMALL, activation=activation).fit(X[:1], [3.0])
    assert np.abs(one.predict(new) - 3).max() < 1e-12
    two = ConvexHeadClassifier(**SMALL, activation=activation).fit(X[:2], ["x", "y"])
    assert two.predict(X[:2]).tolist() == ["x", "y"]


@pytest.mark.parametrize("kind", KINDS)
def test_samples_of_constant_columns(kind):
    X = np.full((12, 3), 0.1)
    y = np.arange(12) % 3 % 2
    made = ConvexHeadClassifier(**SMALL, gates=kind).fit(X, y)
    assert np.abs(made.predict_proba(X * 5)[:, 1] - y.mean()).max() < 1e-4
    zeros = ConvexHeadRegressor(**SMALL, gates=kind, standardize=False).fit(np.zeros((12, 3)), y)
    assert np.abs(zeros.predict(X) - y.mean()).max() < 1e-3 and zeros.predict(X).std() < 1e-12


@pytest.mark.parametrize("labels", [["yes", "no"], [True, False], [-1, 1], [0.0, 2.0], [10**9, 3]])
def test_labels_of_every_type(labels):
    X, y, _ = data()
    made, plain = ConvexHeadClassifier(**SMALL), ConvexHeadClassifier(**SMALL).fit(X, y)
    named = np.array(sorted(labels))[y]
    found = made.fit(X, named).predict(X)
    assert found.dtype == named.dtype and np.array_equal(found, np.array(sorted(labels))[plain.predict(X)])


@pytest.mark.parametrize("options", [{}, {"method": "fista"}, {"activation": "relu"}])
def test_fits_cut_short_warn_of_it(options):
    X, y, _ = data(9, n=60)
    told = "ConvexHeadClassifier: relative duality gap .* after 1 iterations.*: raise max_iter"
    with pytest.warns(ConvergenceWarning, match=told):
        made = ConvexHeadClassifier(n_gates=20, lam=1e-3, max_iter=1, tol=1e-12, **options).fit(X, y)
    assert made.solution_.status == "max_iterations" and made.n_iter_ == 1 and made.predict(X).shape == (60,)
    assert np.abs(made.to_torch()(torch.from_numpy(X)).detach().numpy()[:, 1] - made.decision_function(X)).max() < 1e-9


def test_the_linear_probe():
    X, y, new = data(10, n=60)
    probe = linear_probe(X, y)
    S = (X - X.mean(0)) / np.where(X.std(0) > 1e-12, X.std(0), 1)
    C = probe[-1].C
    assert C in np.logspace(-4, 2, 7)
    twin = LogisticRegression(C=C, max_iter=2000, random_state=0).fit(S[:, :2], y)
    assert np.abs(probe[-1].coef_[0, :2] - twin.coef_[0]).max() < 1e-3
    assert linear_probe(X[:3], [0, 1, 1]).predict(new).shape == (25,)  # too few for folds
