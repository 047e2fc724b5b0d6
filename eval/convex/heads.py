"""Heads on frozen features: ours beside what practitioners use, on the same samples, with the same budget to choose in.

    python eval/convex/heads.py --data FOLDER [--model NAME=FOLDER ...] [--embedder FOLDER] [--sets agnews/dense ...]
        [--train 1000] [--seeds 5] [--only logistic ours ...] [--cache FOLDER]

FOLDER of --data holds agnews/, sst2/, imdb/, mnist_t10k/ and uci/ as in the project's data folder.  --model: language models,
dense or compressed, whose mean-pooled last hidden states (at most 128 tokens a text) are the features; --embedder: a sentence
encoder.  mnist: pixels, ten classes; uci: raw columns.

Every seed draws `train` training samples (UCI: half of the rows, at most) of the training part; a fifth of them is set apart to
choose settings by its NLL, then the chosen setting is fitted to all of them, but for early-stopped networks, which keep the fifth
as their stopping rule.  The test part is the same for all seeds (UCI: the other half) and is read once, by `measure`.
Scores of methods without probabilities become some by a softmax whose temperature is fitted on the fifth.
seconds: from samples to the fitted model, all choosing included, on one thread.  parameters: numbers that prediction needs.
nll: nats; ece: expected calibration error in 15 bins.  The table tells mean and standard deviation over seeds.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from lplr.evaluate.classification import accuracy, calibration_error, nll

TARGET = Path(__file__).parents[1] / "results" / "convex_heads.json"
MAX_LENGTH, TEST_TEXTS = 128, 2000
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


# --- methods


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


# --- data


def texts_of(folder: Path, name: str) -> tuple[tuple[list[str], list[str]], tuple[list[str], list[str]]]:
    from lplr.hf.labelled import read_labelled

    files = {
        "agnews": ("train10k.jsonl", "test.jsonl"),
        "sst2": ("train.tsv", "dev.tsv"),
        "imdb": ("train.jsonl", "test.jsonl"),
    }[name]
    parts = [read_labelled(str(folder / name / file)) for file in files]
    return (parts[0].texts, parts[0].labels), (parts[1].texts, parts[1].labels)


def chosen_texts(folder: Path, name: str, most: int) -> tuple[list[str], np.ndarray, list[str], np.ndarray]:
    """`most` training texts and TEST_TEXTS of the test part, drawn once with a fixed seed; labels as numbers."""
    (texts, labels), (test, truth) = texts_of(folder, name)
    words = sorted(set(labels))
    rng = np.random.default_rng(0)
    train, apart = rng.permutation(len(texts))[:most], rng.permutation(len(test))[:TEST_TEXTS]
    y, yt = (np.array([words.index(label) for label in given]) for given in (labels, truth))
    return [texts[i] for i in train], y[train], [test[i] for i in apart], yt[apart]


def text_features(source: str, texts: list[str], cache: Path) -> np.ndarray:
    from lplr import load, load_tokenizer
    from lplr.hf.features import encode, features, fingerprint

    tokens = encode(load_tokenizer(source), texts, MAX_LENGTH)
    file = cache / f"features-{fingerprint(Path(source), tokens, 'mean')[:24]}.npy"
    if file.is_file() and not np.isnan(np.load(file, mmap_mode="r")).any():
        return np.load(file)
    return features(load(source), tokens, cache=file).numpy()  # type: ignore[arg-type]


def embedder_features(source: str, texts: list[str], cache: Path) -> np.ndarray:
    """Mean-pooled states of an encoder of transformers."""
    from transformers import AutoModel, AutoTokenizer

    from lplr.hf.features import encode, features, fingerprint

    tokens = encode(AutoTokenizer.from_pretrained(source), texts, MAX_LENGTH)
    file = cache / f"features-{fingerprint(Path(source), tokens, 'mean')[:24]}.npy"
    return features(AutoModel.from_pretrained(source).eval(), tokens, cache=file).numpy()


def mnist(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    def read(name: str, offset: int) -> np.ndarray:
        return np.frombuffer(gzip.open(folder / "mnist_t10k" / name).read(), np.uint8, offset=offset)

    return read("t10k-images-idx3-ubyte.gz", 16).reshape(-1, 784) / 255.0, read("t10k-labels-idx1-ubyte.gz", 8).astype(int)


def table_of(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """A CSV without header, the target last; columns of words are coded one by one, rows with a gap are left out."""
    rows = [row for row in csv.reader(file.open()) if row and not any(cell.strip() in ("", "?", "NA") for cell in row)]
    columns = []
    for column in list(zip(*rows, strict=True))[:-1]:
        try:
            columns.append(np.array(column, float)[:, None])
        except ValueError:
            words = sorted(set(column))
            columns.append(np.eye(len(words))[[words.index(w) for w in column]])
    targets = [row[-1] for row in rows]
    words = sorted(set(targets))
    return np.hstack(columns), np.array([words.index(t) for t in targets])


def load_set(name: str, args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Training pool and test part; no test part where the seeds split the rows."""
    kind, _, which = name.partition("/")
    if kind == "mnist":
        X, y = mnist(args.data)
        return X[:8000], y[:8000], X[8000:], y[8000:]
    if kind == "uci":
        return (*table_of(args.data / "uci" / f"{which}.csv"), None, None)
    texts, y, test, yt = chosen_texts(args.data, kind, args.pool)
    if which == "minilm":
        return embedder_features(args.embedder, texts, args.cache), y, embedder_features(args.embedder, test, args.cache), yt
    source = dict(pair.split("=", 1) for pair in args.model)[which]
    return text_features(source, texts, args.cache), y, text_features(source, test, args.cache), yt


def draw(X: np.ndarray, y: np.ndarray, size: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows to fit, to choose on, and the rest; every class in all of them as far as it goes."""
    from sklearn.model_selection import train_test_split

    rows, rest = train_test_split(np.arange(len(y)), train_size=size, stratify=y, random_state=seed)
    fit, apart = train_test_split(rows, test_size=0.2, stratify=y[rows], random_state=seed)
    return fit, apart, rest


# --- measuring


def measure(fitted: Fitted, X: np.ndarray, y: np.ndarray) -> dict[str, float]:
    p, truth = torch.from_numpy(np.asarray(fitted.predict(X), float)), torch.from_numpy(y)
    return {"accuracy": accuracy(p, truth), "nll": nll(p, truth), "ece": calibration_error(p, truth)}


def run_set(name: str, args: argparse.Namespace) -> dict[str, Any]:
    X, y, Xt, yt = load_set(name, args)
    size = min(args.train, len(y) // 2) if Xt is None else args.train
    rows: dict[str, Any] = {}
    for seed in range(args.seeds):
        fit, apart, rest = draw(X, y, size, seed)
        sample = Sample(X[fit].astype(float), y[fit], X[apart].astype(float), y[apart], len(set(y)), seed)
        test = (X[rest], y[rest]) if Xt is None or yt is None else (Xt, yt)
        for method in args.only or [m for m in METHODS if m not in SLOW]:
            start = time.perf_counter()
            fitted = METHODS[method](sample)
            seconds = time.perf_counter() - start
            found = measure(fitted, test[0].astype(float), test[1])
            found |= {"seconds": seconds, "parameters": fitted.parameters, "chosen": fitted.chosen}
            rows.setdefault(method, []).append(found)
            print(f"{name:22} seed {seed} {method:22} " + " ".join(f"{k} {found[k]:.4g}" for k in list(found)[:5]), flush=True)
    return {"train": size, "features": X.shape[1], "classes": len(set(y)), "test": len(test[1]), "methods": rows}


def table(name: str, found: dict[str, Any]) -> None:
    facts = f"{found['features']} features, {found['classes']} classes, {found['test']} to test"
    print(f"\n{name}: {found['train']} training samples, {facts}")
    print(f"{'':22} {'accuracy':>16} {'nll':>8} {'ece':>8} {'seconds':>9} {'parameters':>11}")
    for method, rows in found["methods"].items():
        mean = {k: statistics.fmean(row[k] for row in rows) for k in ("accuracy", "nll", "ece", "seconds", "parameters")}
        spread = statistics.stdev(row["accuracy"] for row in rows) if len(rows) > 1 else 0.0
        print(
            f"{method:22} {mean['accuracy']:8.4f} +-{spread:.4f} {mean['nll']:8.4f} {mean['ece']:8.4f} {mean['seconds']:9.2f} "
            f"{mean['parameters']:11,.0f}"
        )
    methods = found["methods"]
    if "ours" in methods:
        at = {m: statistics.fmean(row["accuracy"] for row in rows) for m, rows in methods.items()}
        winner = max(at, key=lambda m: at[m])
        error = (at[winner] * (1 - at[winner]) / found["test"]) ** 0.5
        print(f"highest accuracy: {winner}; ours is {at[winner] - at['ours']:.4f} behind, one standard error is {error:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", nargs="+", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--embedder")
    parser.add_argument("--sets", nargs="+", required=True, help="agnews/NAME sst2/NAME imdb/minilm mnist uci/ionosphere ...")
    parser.add_argument("--train", type=int, default=1000)
    parser.add_argument("--pool", type=int, default=2000, help="training texts that features are made of")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=list(METHODS))
    parser.add_argument("--cache", type=Path, default=Path("features"))
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    warnings.filterwarnings("ignore", module="sklearn")
    args.cache.mkdir(parents=True, exist_ok=True)
    held = json.loads(TARGET.read_text()) if TARGET.is_file() else {"sets": {}}
    for name in args.sets:
        found = run_set(name, args)
        table(name, found)
        held["sets"].setdefault(name, found)["methods"] |= found["methods"]
        held |= {"machine": platform.machine(), "threads": torch.get_num_threads()}
        held["versions"] = {p: metadata.version(p) for p in ("torch", "scikit-learn", "lightgbm", "transformers")}
        TARGET.write_text(json.dumps(held, indent=1) + "\n")


if __name__ == "__main__":
    main()
