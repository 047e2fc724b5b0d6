"""The heads that eval/convex/heads.py compares, each a function of a Sample that chooses its settings and returns a Fitted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

COMPONENTS = 64  # of features for CRONOS, whose cones are projected onto in time d^3
TRIALS = 12  # settings that a method may try, where it has more than it needs

Probabilities = Callable[[np.ndarray], np.ndarray]


class Sample(NamedTuple):
    """Training samples: to fit, and the fifth set apart to choose; seed of everything random."""

    X: np.ndarray
    y: np.ndarray
    Xv: np.ndarray
    yv: np.ndarray
    classes: int
    seed: int

    @property
    def whole(self) -> tuple[np.ndarray, np.ndarray]:
        return np.concatenate([self.X, self.Xv]), np.concatenate([self.y, self.yv])


class Fitted(NamedTuple):
    predict: Probabilities
    parameters: int
    chosen: dict[str, Any]


def standardised(X: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    mean, scale = X.mean(0), X.std(0)
    scale[scale == 0] = 1
    return lambda Z: (Z - mean) / scale


def few_components(X: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Standardised columns or, where these are many, their first COMPONENTS principal components, each of its own size."""
    scale = standardised(X)
    if X.shape[1] <= COMPONENTS:
        return scale
    sizes, vectors = np.linalg.eigh(scale(X).T @ scale(X) / len(X))
    basis = vectors[:, -COMPONENTS:] / np.sqrt(sizes[-1])
    return lambda Z: scale(Z) @ basis


def softmax(scores: np.ndarray) -> np.ndarray:
    scores = np.stack([-scores, scores], 1) if scores.ndim == 1 else scores
    scores = np.exp(scores - scores.max(1, keepdims=True))
    return scores / scores.sum(1, keepdims=True)


def log_loss(p: np.ndarray, y: np.ndarray) -> float:
    return float(-np.log(np.clip(p[np.arange(len(y)), y], 1e-300, None)).mean())


def tempered(scores: Callable[[np.ndarray], np.ndarray], X: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """(loss, temperature) of the softmax of scores on left-out samples."""
    s = scores(X)
    return min((log_loss(softmax(t * s), y), t) for t in np.geomspace(0.05, 50, 60))


def searched(sample: Sample, make: Callable[[dict[str, Any]], Any], settings: list[dict[str, Any]]) -> Fitted:
    """The estimator of scikit-learn with the least loss on the fifth, fitted to all samples; columns standardised."""
    scale = standardised(sample.X)
    best: tuple[float, dict[str, Any], float] | None = None
    for setting in settings:
        model = make(setting).fit(scale(sample.X), sample.y)
        if hasattr(model, "predict_proba"):
            loss, t = log_loss(model.predict_proba(scale(sample.Xv)), sample.yv), 0.0
        else:
            loss, t = tempered(lambda Z, m=model: m.decision_function(scale(Z)), sample.Xv, sample.yv)
        if best is None or loss < best[0]:
            best = loss, setting, t
    assert best is not None
    _, setting, t = best
    X, y = sample.whole
    rescale = standardised(X)
    model = make(setting).fit(rescale(X), y)

    def predict(Z: np.ndarray) -> np.ndarray:
        return softmax(t * model.decision_function(rescale(Z))) if t else model.predict_proba(rescale(Z))

    return Fitted(predict, size_of(model, X.shape[1]), setting)


def size_of(model: Any, d: int) -> int:
    if hasattr(model, "coefs_"):
        return sum(a.size for a in (*model.coefs_, *model.intercepts_))
    if hasattr(model, "support_vectors_"):
        return model.support_vectors_.size + model.dual_coef_.size
    if hasattr(model, "booster_"):
        return sum(3 * tree["num_leaves"] for tree in model.booster_.dump_model()["tree_info"])
    return np.asarray(model.coef_).size + np.asarray(model.intercept_).size


def logistic(sample: Sample) -> Fitted:
    from sklearn.linear_model import LogisticRegression

    grid = [{"C": float(c)} for c in np.geomspace(1e-4, 1e2, 13)]
    return searched(sample, lambda s: LogisticRegression(**s, max_iter=2000), grid)


def linear_svm(sample: Sample) -> Fitted:
    from sklearn.svm import LinearSVC

    return searched(sample, lambda s: LinearSVC(**s, max_iter=5000), [{"C": float(c)} for c in np.geomspace(1e-5, 1, 11)])


def ridge(sample: Sample) -> Fitted:
    from sklearn.linear_model import RidgeClassifier

    return searched(sample, lambda s: RidgeClassifier(**s), [{"alpha": float(a)} for a in np.geomspace(1e-1, 1e5, 13)])


def kernel_svm(sample: Sample) -> Fitted:
    from sklearn.svm import SVC

    d = sample.X.shape[1]
    grid = [{"C": c, "gamma": g / d} for c in (0.3, 1.0, 3.0, 10.0) for g in (0.1, 0.3, 1.0)]
    return searched(sample, lambda s: SVC(**s, decision_function_shape="ovr"), grid)


def sklearn_mlp(sample: Sample) -> Fitted:
    from sklearn.neural_network import MLPClassifier

    common = {"hidden_layer_sizes": (64,), "early_stopping": True, "max_iter": 300, "random_state": sample.seed}
    grid = [{"alpha": a, "learning_rate_init": r} for a in (1e-4, 1e-2, 1.0) for r in (3e-4, 1e-3, 3e-3)]
    return searched(sample, lambda s: MLPClassifier(**common, **s), grid)


def lightgbm(sample: Sample) -> Fitted:
    from lightgbm import LGBMClassifier

    common = {"verbose": -1, "n_jobs": 1, "random_state": sample.seed, "subsample_freq": 1, "subsample": 0.8}
    grid = [
        {"n_estimators": n, "learning_rate": r, "num_leaves": 15, "colsample_bytree": 0.3, "min_child_samples": 10}
        for n in (100, 300)
        for r in (0.03, 0.1)
    ]
    return searched(sample, lambda s: LGBMClassifier(**common, **s), grid)


def adamw_mlp(sample: Sample) -> Fitted:
    """64 ReLU units, AdamW, cosine to zero, early stopping on the fifth; TRIALS random settings, the best one kept as it is."""
    scale = standardised(sample.X)
    X, Xv = (torch.tensor(scale(Z), dtype=torch.float32) for Z in (sample.X, sample.Xv))
    y, yv = torch.tensor(sample.y), torch.tensor(sample.yv)
    rng = np.random.default_rng(sample.seed)
    best: tuple[float, dict[str, float], torch.nn.Module] | None = None
    for trial in range(TRIALS):
        setting = {"lr": 10 ** rng.uniform(-4, -2), "weight_decay": 10 ** rng.uniform(-4, 0), "dropout": rng.uniform(0, 0.5)}
        loss, net = trained(X, y, Xv, yv, sample.classes, setting, sample.seed * TRIALS + trial)
        if best is None or loss < best[0]:
            best = loss, setting, net
    assert best is not None
    net = best[2]

    def predict(Z: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return net(torch.tensor(scale(Z), dtype=torch.float32)).double().softmax(1).numpy()

    return Fitted(predict, sum(p.numel() for p in net.parameters()), best[1])


def trained(
    X: torch.Tensor, y: torch.Tensor, Xv: torch.Tensor, yv: torch.Tensor, classes: int, setting: dict[str, float], seed: int
) -> tuple[float, torch.nn.Module]:
    epochs, batch, patience = 60, 64, 10
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = torch.nn.Sequential(
            torch.nn.Linear(X.shape[1], 64), torch.nn.ReLU(), torch.nn.Dropout(setting["dropout"]), torch.nn.Linear(64, classes)
        )
        optimiser = torch.optim.AdamW(net.parameters(), lr=setting["lr"], weight_decay=setting["weight_decay"])
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * -(-len(X) // batch))
        least, kept, since = float("inf"), {}, 0
        for _ in range(epochs):
            net.train()
            for rows in torch.randperm(len(X), generator=generator).split(batch):
                optimiser.zero_grad()
                torch.nn.functional.cross_entropy(net(X[rows]), y[rows]).backward()
                optimiser.step()
                schedule.step()
            net.eval()
            with torch.no_grad():
                loss = float(torch.nn.functional.cross_entropy(net(Xv), yv))
            since += 1
            if loss < least:
                least, since = loss, 0
                kept = {k: v.clone() for k, v in net.state_dict().items()}
            if since >= patience:
                break
    net.load_state_dict(kept)
    return least, net


def ours(sample: Sample, **settings: Any) -> Fitted:
    """`ConvexHeadClassifier` with its defaults: lambda by cross-validation on all samples."""
    from lplr.convex.estimators import ConvexHeadClassifier

    X, y = sample.whole
    head = ConvexHeadClassifier(random_state=sample.seed, **settings).fit(X, y)
    parameters = sum(t.numel() for t in head.to_torch().state_dict().values())
    return Fitted(head.predict_proba, parameters, {"lam": float(head.lam_), "relative_gap": head.solution_.relative_gap})


def cronos(sample: Sample, *, method: str = "cronos", lams: tuple[float, ...] = (), iterations: int | None = None) -> Fitted:
    """The ReLU programme, one against all, squared loss: labels +-1, 32 gates, the network of the solution, softmax of scores.

    On `few_components` of the features: at 576 features one certificate took minutes.
    """
    from lplr.convex import Penalty, Problem, clean, gaussian, lambda_max, patterns, solve
    from lplr.convex.network import export

    def fitted(X: np.ndarray, y: np.ndarray, share: float) -> Callable[[np.ndarray], np.ndarray]:
        scale = few_components(X)
        rows = torch.tensor(np.hstack([scale(X), np.ones((len(X), 1))]))
        G = gaussian(rows.shape[1], 32, torch.Generator().manual_seed(sample.seed))
        D = patterns(rows, G)
        D = D[:, clean(D)]
        Y = 2.0 * torch.nn.functional.one_hot(torch.tensor(y), sample.classes).double() - 1
        problem = Problem(rows, Y, D, "squared", "relu")
        lam = share * lambda_max(problem, "columns") if share else 1e-3 / len(X)
        net = export(solve(problem, Penalty(lam, "columns"), method=method, tol=1e-3, max_iter=iterations), ones=True)
        sizes.append(sum(t.numel() for t in net.state_dict().values()))

        def scores(Z: np.ndarray) -> np.ndarray:
            with torch.no_grad():
                return net(torch.tensor(scale(Z))).numpy()

        return scores

    sizes: list[int] = []
    tried = []
    for share in lams or (0.0,):
        scores = fitted(sample.X, sample.y, share)
        tried.append((*tempered(scores, sample.Xv, sample.yv), share))
    loss, t, share = min(tried)
    scores = fitted(*sample.whole, share)
    return Fitted(lambda Z: softmax(t * scores(Z)), sizes[-1], {"lam / lambda_max": share})


METHODS: dict[str, Callable[[Sample], Fitted]] = {
    "logistic": logistic,
    "linear SVM": linear_svm,
    "ridge": ridge,
    "kernel SVM": kernel_svm,
    "sklearn MLP": sklearn_mlp,
    "AdamW MLP": adamw_mlp,
    "LightGBM": lightgbm,
    "CRONOS, as published": lambda s: cronos(s, iterations=10),
    "CRONOS, repaired": lambda s: cronos(s, method="admm", lams=(0.3, 0.1, 0.03), iterations=300),
    "ours": ours,
    "ours, relu": lambda s: ours(s, activation="relu", n_gates=16),
}
SLOW = {"ours, relu"}  # only where it is named
