"""A head on a language model with fewer neurons: pruned by least squares, fitted again, its size chosen on texts kept apart.

Of the samples that the head was fitted to, a fifth is kept apart.  On the others the head's neurons are taken away one by one
(`prune.least_squares`); for a row of sizes the programme with the gates that are left is solved again to its certified gap at the
head's lambda, and measured on the fifth.  The smallest within one standard error of the best is fitted once more, to all samples.
A gated head keeps its linear part, so with no gates at all it is a linear probe.  Held-out texts are only looked at to report.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import lplr
from lplr.convex.gates import Gates
from lplr.convex.heads import FACTS, HeadFit, estimators_module, features_of, fit_features, held_apart, write
from lplr.convex.network import GatedNetwork, Network, load
from lplr.convex.prune import Sized, contributions, least_squares, smallest
from lplr.errors import CheckpointError, OutputError
from lplr.files import write_text_atomic
from lplr.hf.classifier import WEIGHTS, HeadConfig, backbone_of, is_head
from lplr.hf.labelled import read_labelled

PRUNED = "prune.json"  # in the new head's folder; `report.curves` makes a page of it
SIZES = 10  # in the row, equal factors apart
Step = Callable[[float, float, str], None]


@dataclass(frozen=True)
class SizeRow:
    """A size: gates kept; neurons and parameters of the refitted head; NLL, its standard error and accuracy on texts kept apart;
    accuracy on held-out text.
    """

    gates: int
    neurons: int
    parameters: int
    nll: float
    error: float
    accuracy: float
    held_out_accuracy: float


@dataclass(frozen=True)
class HeadPruned:
    """What `prune_head` made: the new head, and all sizes it was chosen from; chosen is the number of gates."""

    head: HeadFit
    before: int
    chosen: int
    sizes: list[SizeRow]


def prune_head(
    head: Path,
    dataset: str,
    *,
    held_out: str | None = None,
    output: Path | None = None,
    limit: int | None = None,
    gates: int | None = None,
    device: str = "cpu",
    progress: Step | None = None,
) -> HeadPruned:
    """Prune the head in the folder `head`; dataset, held_out and limit as for `fit_head`, best those it was fitted to.

    output: the new head's folder (head-pruned beside it).  gates: a size of your own, in place of the chosen one.
    Raises CheckpointError for a folder without a head, DatasetError for text with other labels, RecipeError, OutputError.
    """
    if not is_head(head) or not (head / FACTS).is_file():
        raise CheckpointError(f"{head} is no head with a {FACTS}: give a folder that `lplr fit-head` wrote")
    step = progress or (lambda *_: None)
    estimators_module()
    old, network, config = json.loads((head / FACTS).read_text()), load(head / WEIGHTS), HeadConfig.from_pretrained(head)
    target = output or head.with_name(f"{head.name}-pruned")
    if target.exists() and not is_head(target):
        raise OutputError(f"{target} exists and is no head: give another --output")
    folder = backbone_of(head, config)
    data = read_labelled(dataset, limit=limit)
    rest = read_labelled(held_out, split="heldout") if held_out is not None else None
    y, yt = (None if one is None else torch.tensor(one.numbers(old["classes"], str(head))) for one in (data, rest))
    assert y is not None
    started = time.perf_counter()
    X, Xt = features_of(folder, data, rest, old["settings"], head.parent, device, step)
    seen = time.perf_counter()
    if Xt is None or yt is None:
        X, y, Xt, yt = held_apart(X, y, old["settings"]["seed"])
    lam, settings = float(old["lam"]), old["settings"]
    orders = _orders(network, X, gates)
    found = _measured(network, orders, (X, y), (Xt, yt), settings, lam, step)
    chosen = smallest([Sized(row.gates, network, row.nll, row.error) for row in found]).count if gates is None else found[0].gates
    module, facts = fit_features(X, y, Xt, yt, settings, lam, step, gates=_gates(network, orders[chosen]))
    facts |= {"seconds_features": seen - started, "seconds_fit": time.perf_counter() - seen}
    kept = {name: old[name] for name in ("classes", "settings")}
    made = HeadFit(
        folder=str(target), dataset=data.name, dataset_sha256=data.sha256, samples=len(y), held_out_samples=len(yt),
        held_out=rest.name if rest is not None else old["held_out"], lplr=lplr.__version__, **kept, **facts,
    )  # fmt: skip
    write(target, folder, module, made)
    result = HeadPruned(made, network.shape[0], chosen, found)
    write_text_atomic(target / PRUNED, json.dumps(asdict(result), indent=1) + "\n")
    return result


def _orders(network: Network, X: Tensor, gates: int | None) -> dict[int, Tensor]:
    """Neurons (K,) bool that are left, by their number: SIZES of them, or the one asked for; all where it is larger."""
    every = {int((c > 0).sum()): c > 0 for c in least_squares(contributions(network, X))}
    if isinstance(network, GatedNetwork):
        every[0] = torch.zeros(network.shape[0], dtype=torch.bool)  # the linear part
    most = max(every)
    row = np.unique(np.geomspace(1, max(most, 1), SIZES).round().astype(int)).tolist() + ([0] if 0 in every else [])
    wanted = [min(gates, most)] if gates is not None else row
    return {count: every[count] for count in sorted(set(wanted), reverse=True) if count in every}


def _gates(network: Network, kept: Tensor) -> Gates:
    """The gates of neurons kept, and for a gated network the one that is always open."""
    if isinstance(network, GatedNetwork):
        first, always = network.gates, torch.zeros(network.shape[1], 1, dtype=torch.float64)
    else:
        first, always = network.layers[0], torch.zeros(network.shape[1], 0, dtype=torch.float64)
    vectors, offsets = first.weight.detach().double()[kept].T, first.bias.detach().double()[kept]
    ones = torch.ones(always.shape[1], dtype=torch.float64)
    return Gates(torch.cat([always, vectors], 1), torch.cat([ones, offsets]))


def _measured(
    network: Network, orders: dict[int, Tensor], samples: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor],
    settings: dict[str, Any], lam: float, step: Step,
) -> list[SizeRow]:  # fmt: skip
    """A row for every size, the largest first."""
    part, labels, apart, truth = held_apart(*samples, settings["seed"] + 1)
    rows = []
    for done, (count, kept) in enumerate(orders.items()):
        step(float(done), float(len(orders) + 1), f"{count} gates")
        estimator = estimators_module().ConvexHeadClassifier(
            lam=lam, gates=_gates(network, kept), activation=settings["activation"], random_state=settings["seed"]
        )
        estimator.fit(part.double().numpy(), labels.numpy())
        p = torch.from_numpy(estimator.predict_proba(apart.double().numpy()))
        losses = -p.gather(1, truth[:, None])[:, 0].clamp_min(1e-300).log()
        right = estimator.predict(held_out[0].double().numpy()) == held_out[1].numpy()
        made = estimator.to_torch()
        rows.append(
            SizeRow(
                count, made.shape[0], sum(t.numel() for t in made.state_dict().values()), float(losses.mean()),
                float(losses.std(correction=0)) / len(losses) ** 0.5, float((p.argmax(1) == truth).double().mean()),
                float(right.mean()),
            )
        )  # fmt: skip
    return rows


def as_table(found: HeadPruned) -> list[tuple[str, ...]]:
    """Rows for people, the columns of COLUMNS."""
    return [
        (
            str(row.gates), str(row.neurons), f"{row.parameters:,}", f"{row.nll:.4f} ± {row.error:.4f}", f"{row.accuracy:.4f}",
            f"{row.held_out_accuracy:.4f}", "chosen" if row.gates == found.chosen else "",
        )
        for row in found.sizes
    ]  # fmt: skip


COLUMNS = ("gates", "neurons", "parameters", "NLL kept apart", "accuracy kept apart", "accuracy held out", "")
