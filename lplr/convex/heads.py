"""A head on a language model: its last hidden states as features, a convex programme on top, a folder beside the model.

    features (n, d) of `hf.features`  ->  `ConvexHeadClassifier`  ->  DIR/heads/NAME, a sequence-classification model

The head minimises its convex programme for the gates that were drawn, to the duality gap it is given, and says how large that is.
A logistic regression is fitted to the same samples: which of the two does better on the held-out texts is told, whichever it is.
After the model is compressed again, `like` fits the same head to the new features: settings, seed and lambda are those of the
other head, so nothing is searched for.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import lplr
from lplr.convex.gates import Gates
from lplr.errors import CheckpointError, DatasetError, OutputError, RecipeError, choose
from lplr.hf.classifier import HeadConfig, HeadModel, is_head, write_head
from lplr.hf.export import TOKENIZER_FILES
from lplr.hf.features import POOLINGS, encode, features, fingerprint
from lplr.hf.labelled import Labelled, read_labelled
from lplr.hf.load import load_model, load_tokenizer

HEADS = "heads"  # folder beside the model's files
FACTS = "head.json"
HELD_OUT = 0.2  # share of the samples on which head and linear probe are compared where no other text is given
Step = Callable[[float, float, str], None]


@dataclass(frozen=True)
class HeadFit:
    """What `fit_head` made: where, of what, how good on texts that it has not seen, beside a logistic regression on the same."""

    folder: str
    dataset: str
    dataset_sha256: str
    held_out: str
    classes: list[str]
    samples: int
    held_out_samples: int
    settings: dict[str, Any]
    lam: float
    relative_gap: float
    status: str
    message: str
    neurons: int
    parameters: int
    accuracy: float
    nll: float
    probe_accuracy: float
    probe_nll: float
    seconds_features: float
    seconds_fit: float
    lplr: str

    @property
    def verdict(self) -> str:
        """Which of the two to use, in words."""
        error = (self.accuracy * (1 - self.accuracy) / self.held_out_samples) ** 0.5
        ahead = self.accuracy - self.probe_accuracy
        if abs(ahead) <= error:
            better = "head" if self.nll <= self.probe_nll else "linear probe"
            return f"as accurate as a linear probe within one standard error ({error:.4f}); the {better} has the lower NLL"
        return "more accurate than a linear probe" if ahead > 0 else "less accurate than a linear probe: use the probe here"


def fit_head(
    model: str,
    dataset: str,
    *,
    output: Path | None = None,
    held_out: str | None = None,
    pooling: str = "mean",
    activation: str = "gated",
    n_gates: int = 64,
    lam: float | str = "cv",
    seqlen: int = 256,
    limit: int | None = None,
    like: Path | None = None,
    seed: int = 0,
    device: str = "cpu",
    progress: Step | None = None,
) -> HeadFit:
    """Fit a head on the language model in the folder `model` to labelled text; write it to `output`, DIR/heads/NAME by default.

    held_out: labelled text for the comparison with the linear probe; without it HELD_OUT of the samples, the same for a seed.
    lam: a number, or "cv" for cross-validation over the solution path.  like: a head whose settings and lambda are taken.
    Raises RecipeError for settings out of range, DatasetError for text that cannot be used, CheckpointError for a model that
    is not there, OutputError for an output that is something else.
    """
    folder = Path(model).expanduser()
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{model} is no folder of a model: give one that `lplr compress` wrote, or of transformers")
    choose(POOLINGS, pooling, "pooling")
    estimators_module()
    step = progress or (lambda *_: None)
    settings = {"pooling": pooling, "seqlen": seqlen, "activation": activation, "n_gates": n_gates, "seed": seed}
    old = _settings_of(like) if like is not None else {}
    settings |= old.get("settings", {})
    lam = old.get("lam", lam)
    data = read_labelled(dataset, limit=limit)
    target = output or folder / HEADS / _name(dataset)
    if target.exists() and not is_head(target):
        raise OutputError(f"{target} exists and is no head: give another --output")
    rest = read_labelled(held_out, split="heldout") if held_out is not None else None
    classes = _classes(data)
    y, yt = (None if one is None else torch.tensor(one.numbers(classes, data.name)) for one in (data, rest))
    assert y is not None
    started = time.perf_counter()
    X, Xt = features_of(folder, data, rest, settings, target.parent, device, step)
    seen = time.perf_counter()
    if Xt is None or yt is None:
        X, y, Xt, yt = held_apart(X, y, settings["seed"])
    head, facts = fit_features(X, y, Xt, yt, settings, lam, step)
    facts |= {"seconds_features": seen - started, "seconds_fit": time.perf_counter() - seen}
    found = HeadFit(
        folder=str(target),
        dataset=data.name,
        dataset_sha256=data.sha256,
        held_out=rest.name if rest is not None else f"{HELD_OUT:.0%} of it",
        classes=classes,
        samples=len(y),
        held_out_samples=len(yt),
        settings=settings,
        lplr=lplr.__version__,
        **facts,
    )
    write(target, folder, head, found)
    return found


def as_table(found: HeadFit) -> list[tuple[str, str]]:
    """(measure, value) rows for people."""
    return [
        ("samples", f"{found.samples:,}, {found.held_out_samples:,} held out"),
        ("classes", ", ".join(found.classes)),
        ("lambda", f"{found.lam:.3g}"),
        ("solution", f"{found.status}: {found.message}"),
        ("neurons", str(found.neurons)),
        ("parameters", f"{found.parameters:,}"),
        ("accuracy, linear probe's", f"{found.accuracy:.4f}, {found.probe_accuracy:.4f}"),
        ("NLL, linear probe's", f"{found.nll:.4f}, {found.probe_nll:.4f}"),
        ("seconds: features, fits", f"{found.seconds_features:.1f}, {found.seconds_fit:.1f}"),
    ]


def estimators_module() -> ModuleType:
    """The estimators of scikit-learn's contract; RecipeError without scikit-learn."""
    try:
        from lplr.convex import estimators
    except ImportError as error:
        raise RecipeError(f"a head needs the package {error.name}: pip install 'lplr[convex]'") from None
    return estimators


def fit_features(
    X: Tensor,
    y: Tensor,
    Xt: Tensor,
    yt: Tensor,
    settings: dict[str, Any],
    lam: float | str,
    step: Step,
    gates: str | Gates = "gaussian",
) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The head's module, and the facts about it and the linear probe."""
    from lplr.evaluate.classification import accuracy, nll

    estimators = estimators_module()
    chosen = {"activation": settings["activation"], "n_gates": settings["n_gates"], "random_state": settings["seed"]}
    estimator = estimators.ConvexHeadClassifier(lam=lam, gates=gates, callback=step, **chosen)
    estimator.fit(X.double().numpy(), y.numpy())
    network = estimator.to_torch()
    step(1.0, 1.0, "fitting the linear probe")
    probe = estimators.linear_probe(X.double().numpy(), y.numpy(), settings["seed"])
    p = torch.from_numpy(estimator.predict_proba(Xt.double().numpy()))
    q = torch.from_numpy(probe.predict_proba(Xt.double().numpy()))
    solution = estimator.solution_
    return network, {
        "lam": float(estimator.lam_),
        "relative_gap": solution.relative_gap,
        "status": solution.status,
        "message": solution.message,
        "neurons": network.shape[0],
        "parameters": sum(t.numel() for t in network.state_dict().values()),
        "accuracy": accuracy(p, yt),
        "nll": nll(p, yt),
        "probe_accuracy": accuracy(q, yt),
        "probe_nll": nll(q, yt),
    }


def features_of(
    folder: Path, data: Labelled, rest: Labelled | None, settings: dict[str, Any], heads: Path, device: str, step: Step
) -> tuple[Tensor, Tensor | None]:
    """Features of both texts, from the cache in the folder of the heads where they are there."""
    from lplr.stream.device import usable_device

    where = usable_device(device)
    tokenizer = load_tokenizer(folder)
    texts = [data.texts, rest.texts if rest is not None else []]
    tokens = [encode(tokenizer, t, settings["seqlen"]) for t in texts if t]
    step(0.0, 1.0, "loading the model")
    model: Any = torch.nn.Module.to(load_model(folder), where)
    total = float(sum(len(row) for part in tokens for row in part))
    found, before = [], 0.0
    for part in tokens:
        cache = heads / f".features-{fingerprint(folder, part, settings['pooling'])[:32]}.npy"

        def told(done: float, _: float, what: str, before: float = before) -> None:
            step(before + done, total, what)

        found.append(features(model, part, pooling=settings["pooling"], cache=cache, progress=told))
        before += sum(map(len, part))
    return found[0], found[1] if rest is not None else None


def held_apart(X: Tensor, y: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(X, y) to fit and (X, y) to compare on: HELD_OUT of every class."""
    generator = torch.Generator().manual_seed(seed)
    apart = torch.zeros(len(y), dtype=torch.bool)
    for c in y.unique():
        of_class = (y == c).nonzero()[:, 0]
        shuffled = of_class[torch.randperm(len(of_class), generator=generator)]
        apart[shuffled[: int(HELD_OUT * len(of_class))]] = True
    if not apart.any():
        raise DatasetError(f"{len(y)} samples are too few to hold some out: give more, or other text with --held-out")
    return X[~apart], y[~apart], X[apart], y[apart]


def _classes(data: Labelled) -> list[str]:
    """The labels in order; DatasetError for one class."""
    classes = sorted(set(data.labels))
    if len(classes) < 2:
        raise DatasetError(f"{data.name}: every label is {classes[0]!r}: a head needs samples of at least two classes")
    return classes


def _name(dataset: str) -> str:
    path = Path(dataset)
    name = f"{path.parent.name}-{path.stem}" if path.suffix and path.parent.name else path.stem or dataset
    return re.sub(r"[^A-Za-z0-9._]+", "-", name).strip("-.") or "head"


def _settings_of(like: Path) -> dict[str, Any]:
    """head.json of another head."""
    try:
        return json.loads((like / FACTS).read_text())
    except (OSError, ValueError):
        raise RecipeError(f"{like} holds no {FACTS}: give a folder that `lplr fit-head` wrote") from None


def write(target: Path, folder: Path, head: torch.nn.Module, found: HeadFit) -> None:
    """The head's folder, whole or not at all; one that was there is replaced."""
    target.parent.mkdir(parents=True, exist_ok=True)
    labels = dict(enumerate(found.classes))
    config = HeadConfig(
        backbone=os.path.relpath(folder.resolve(), target.resolve()),
        pooling=found.settings["pooling"],
        seqlen=found.settings["seqlen"],
        id2label=labels,
        label2id={label: i for i, label in labels.items()},
        problem_type="single_label_classification",
        architectures=[HeadModel.__name__],
    )
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        write_head(scratch, config, head)
        for name in TOKENIZER_FILES:
            if (folder / name).is_file() and name != "generation_config.json":
                shutil.copyfile(folder / name, scratch / name)
        (scratch / FACTS).write_text(json.dumps(asdict(found), indent=1) + "\n")
        scratch.chmod(0o755)
        if target.exists():
            shutil.rmtree(target)
        scratch.replace(target)
    except OSError as error:
        raise OutputError(f"{target} cannot be written ({error.strerror}): check the disk and its permissions") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
