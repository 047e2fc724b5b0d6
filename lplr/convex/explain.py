"""A head on a language model explained by texts: `neurons` on the features of labelled text, written to HEAD/explain.json.

`lplr.report.neurons` makes the page of that file.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lplr.convex.heads import features_of
from lplr.convex.network import GatedNetwork, load
from lplr.convex.neurons import Neuron, explain
from lplr.errors import CheckpointError, RecipeError
from lplr.files import write_text_atomic
from lplr.hf.classifier import WEIGHTS, HeadConfig, backbone_of, is_head
from lplr.hf.labelled import Labelled, read_labelled

EXPLANATION = "explain.json"
EXAMPLES = 3  # texts deepest on each side
LONGEST = 300  # characters of a text
POINTS = 500  # samples in a picture
Step = Callable[[float, float, str], None]


@dataclass(frozen=True)
class Explained:
    """What `explain_head` found: facts, and for each neuron its numbers and the texts that make it."""

    head: str
    dataset: str
    samples: int
    accuracy: float
    classes: list[str]
    kind: str
    network_neurons: int
    linear_effect: float | None
    labels: list[int]
    neurons: list[dict[str, Any]]


def explain_head(
    head: Path,
    dataset: str,
    *,
    neurons: int = 8,
    samples: int = 4,
    limit: int | None = None,
    device: str = "cpu",
    progress: Step | None = None,
) -> Explained:
    """Explain the `neurons` strongest neurons of a head by `samples` texts of a labelled dataset each; write HEAD/explain.json.

    Raises CheckpointError for a folder that is no head, DatasetError for labels it does not know, RecipeError for numbers out of
    range, OutputError where nothing can be written.
    """
    head = head.expanduser()
    if not is_head(head):
        raise CheckpointError(f"{head} is no head: give a folder that `lplr fit-head` wrote")
    if neurons < 1:
        raise RecipeError(f"neurons is {neurons}: give 1 or more")
    config: Any = HeadConfig.from_pretrained(head)
    data = read_labelled(dataset, limit=limit)
    classes = [config.id2label[i] for i in range(len(config.id2label))]
    y = torch.tensor(data.numbers(classes, str(head)))
    settings = {"pooling": config.pooling, "seqlen": config.seqlen}
    step = progress or (lambda *_: None)
    X, _ = features_of(backbone_of(head, config), data, None, settings, head.parent, device, step)
    network = load(head / WEIGHTS).double()
    found = explain(network, X, samples=samples)
    with torch.no_grad():
        accuracy = (network(X.double()).argmax(1) == y).double().mean().item()
    shown = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))[:POINTS].sort().values
    said = Explained(
        head=str(head),
        dataset=data.name,
        samples=len(y),
        accuracy=accuracy,
        classes=classes,
        kind=network.kind,
        network_neurons=network.shape[0],
        linear_effect=_linear_effect(network, X.double()) if isinstance(network, GatedNetwork) else None,
        labels=y[shown].tolist(),
        neurons=[_told(neuron, data, classes, shown) for neuron in found[:neurons]],
    )
    write_text_atomic(head / EXPLANATION, json.dumps(asdict(said), indent=1) + "\n")
    return said


@torch.no_grad()
def _linear_effect(network: GatedNetwork, X: Tensor) -> float:
    """Root mean square, over samples and classes, of the logits of the linear part over their means."""
    Z = network.skip(X)
    Z = Z - Z.mean(0)
    return ((Z - Z.mean(1, keepdim=True)) * Z.shape[1] / (Z.shape[1] - 1)).square().mean().sqrt().item()


def _told(neuron: Neuron, data: Labelled, classes: list[str], shown: Tensor) -> dict[str, Any]:
    """A neuron as JSON: its numbers, texts, and the points of its pictures."""

    def texts(rows: list[int]) -> list[dict[str, Any]]:
        return [
            {"row": j, "label": data.labels[j], "text": data.texts[j][:LONGEST], "distance": neuron.distances[j].item()}
            for j in rows
        ]

    order = neuron.distances.argsort(descending=True).tolist()
    openers = [j for j in order[:EXAMPLES] if neuron.distances[j] > 0]
    closers = [j for j in order[::-1][:EXAMPLES] if neuron.distances[j] <= 0]
    numbers = {
        name: getattr(neuron, name) for name in ("number", "effect", "when_open", "share", "on", "agreement", "correlation")
    }
    points = {
        name: [float(f"{v:.4g}") for v in getattr(neuron, name)[shown].tolist()] for name in ("distances", "added", "along")
    }
    drawn = neuron.distances, neuron.added, neuron.along
    return {
        **numbers,
        "favours": classes[neuron.favours],
        "samples": texts(list(neuron.samples)),
        "open": texts(openers),
        "closed": texts(closers),
        "points": points | {"samples": [[float(t[j]) for t in drawn] for j in neuron.samples]},
    }
