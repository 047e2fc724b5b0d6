"""What the neurons of a network are made of: for each hyperplane the samples whose wedge product it is, and what it does.

    t_j = (x_j w + b) / ||w||      signed distance of sample j to the hyperplane of the neuron (of its gate), samples standardised
    x ^ x_J1 ^ ... ^ x_Jk          of k samples: the distance to the hyperplane through them, up to a factor             (`wedge`)

A trained hyperplane goes through no samples, or through more of them than one can read.  In k coordinates, t and the leading
k - 1 principal directions within the hyperplane, k samples define one: they are chosen among the nearest, far apart from one
another, and how well the two agree on all samples is told.  Of all d coordinates the neuron is then the wedge product of these
samples and of the d - k directions left out, along which both hyperplanes run; d <= k leaves none out.  Where samples lie at one
distance of the hyperplane, as where wedge products were the gates, it goes through them, but for a shift: `on` counts them.
Source: Pilanci, 2023 (2309.16512), for what optimal neurons are; the choice of few samples for a trained one: here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lplr.convex.gates import Gates
from lplr.convex.network import GatedNetwork, ReluNetwork
from lplr.convex.wedge import RANK, principal, through
from lplr.errors import RecipeError

NEAR = 0.05  # share of the samples that a neuron's own are chosen among
FEWEST = 4  # times as many samples as are chosen, at least
ON = 1e-9  # of the spread of distances: samples at one distance


@dataclass(frozen=True)
class Neuron:
    """One neuron over n samples.

    number: its row in the network.  effect: root mean square of what it adds to the logit of output `favours`, over that of the
    others on average; when_open: the mean of that on the open side, where `share` of the samples are.  samples: the rows whose
    wedge product it is, as far as agreement (the share of samples on the same side) and correlation of the distances tell.
    on: samples that it goes through, 0 where they are too few to define it.  distances, added (n,): signed distance of every
    sample, and what is added there; along (n,): the leading coordinate within the hyperplane.
    """

    number: int
    effect: float
    favours: int
    when_open: float
    share: float
    samples: tuple[int, ...]
    on: int
    agreement: float
    correlation: float
    distances: Tensor
    added: Tensor
    along: Tensor


@torch.no_grad()
def explain(network: ReluNetwork | GatedNetwork, X: Tensor, *, samples: int = 4) -> list[Neuron]:
    """The neurons over samples X (n, d), the one with the largest effect first.

    samples: k, how many define a hyperplane; fewer where d or n is.  Raises RecipeError for another number of features, or k < 1.
    """
    X = X.double()
    if X.ndim != 2 or X.shape[1] != network.shape[1] or not len(X):
        raise RecipeError(
            f"samples are {tuple(X.shape)}, the network has {network.shape[1]} features: give (n, {network.shape[1]})"
        )
    if samples < 1:
        raise RecipeError(f"samples is {samples}: a hyperplane is explained by 1 or more")
    gates, added = _parts(network, X)
    mean, scale = X.mean(0), X.std(0, correction=0)
    varies = scale > 1e-13 * X.abs().amax(0)
    inner = torch.where(varies, (X - mean) / torch.where(varies, scale, 1.0), 0.0)
    normals = gates.vectors * torch.where(varies, scale, 0.0)[:, None]  # of the standardised samples
    lengths = normals.norm(dim=0)
    distances = (X @ gates.vectors + gates.offsets) / torch.where(lengths > 0, lengths, 1.0)
    leading = principal(inner, samples) if varies.any() else inner.new_zeros(X.shape[1], 0)
    found = []
    for i in range(len(gates)):
        normal = normals[:, i] / torch.where(lengths[i] > 0, lengths[i], 1.0)
        found.append(_neuron(i, distances[:, i], added[:, i], _within(inner, normal, leading), samples))
    return sorted(found, key=lambda neuron: -neuron.effect)


def _parts(network: ReluNetwork | GatedNetwork, X: Tensor) -> tuple[Gates, Tensor]:
    """The hyperplanes, and what each neuron adds to the outputs (n, m, C)."""
    if isinstance(network, ReluNetwork):
        first, second = network.layers
        gates = Gates(first.weight.double().T, first.bias.double())
        return gates, (X @ gates.vectors + gates.offsets).clamp_min(0)[:, :, None] * second.weight.double().T
    gates = Gates(network.gates.weight.double().T, network.gates.bias.double())
    values = X @ network.values.weight.double().T + network.values.bias.double()
    return gates, values.unflatten(1, (len(gates), network.shape[2])) * gates.patterns(X)[:, :, None]


def _within(inner: Tensor, normal: Tensor, leading: Tensor) -> Tensor:
    """Coordinates (n, k - 1) of samples along principal directions made orthogonal to the normal."""
    both = torch.cat([normal[:, None], leading], 1)
    Q, R = torch.linalg.qr(both)
    kept = R.diagonal().abs() > 1e-6
    kept[0] = False
    return inner @ Q[:, kept]


def _neuron(number: int, distances: Tensor, added: Tensor, within: Tensor, samples: int) -> Neuron:
    C, is_open = added.shape[1], distances > 0
    apart = added if C == 1 else (added - added.mean(1, keepdim=True)) * C / (C - 1)  # over the mean of the others
    means = apart[is_open].mean(0) if is_open.any() else apart.mean(0)
    favours = int(means.argmax()) if C > 1 else 0
    k = min(samples, within.shape[1] + 1, len(distances))
    coordinates = torch.cat([distances[:, None], within[:, : k - 1]], 1)
    chosen, on = _chosen(coordinates)
    agreement, correlation = _likeness(coordinates, chosen, distances[chosen].mean() if on else 0.0)
    return Neuron(
        number=number,
        effect=apart[:, favours].square().mean().sqrt().item(),
        favours=favours,
        when_open=means[favours].item(),
        share=is_open.double().mean().item(),
        samples=tuple(chosen.tolist()),
        on=on,
        agreement=agreement,
        correlation=correlation,
        distances=distances,
        added=apart[:, favours],
        along=within[:, 0] if within.shape[1] else torch.zeros_like(distances),
    )


def _chosen(coordinates: Tensor) -> tuple[Tensor, int]:
    """Rows (k,) of samples next to the hyperplane, coordinate 0, far apart in the others; and how many it goes through."""
    n, k = coordinates.shape
    t = coordinates[:, 0]
    order, noise = t.abs().argsort(stable=True), ON * t.std(correction=0)
    for level in (0.0, t[order[0]]) if k > 1 else (0.0,):  # one sample is at one distance from itself
        on = order[(t[order] - level).abs() <= noise]
        chosen = _apart(coordinates[on, 1:], k)
        if len(chosen) == k:
            return on[chosen], len(on)
    near = order[: max(FEWEST * k, round(NEAR * n))]
    return near[_apart(coordinates[near, 1:], k)], 0


def _apart(points: Tensor, k: int) -> Tensor:
    """Numbers of k points: the first, then the farthest from the affine hull of those before (pivoted QR); fewer if equal."""
    if not len(points):
        return torch.zeros(0, dtype=torch.long)
    rest, chosen = points - points[0], [0]
    size = rest.norm(dim=1).max()
    while len(chosen) < k:
        far = int(rest.norm(dim=1).argmax())
        length = rest[far].norm()
        if not length > RANK * size:
            break
        chosen.append(far)
        direction = rest[far] / length
        rest = rest - torch.outer(rest @ direction, direction)
    return torch.tensor(chosen)


def _likeness(coordinates: Tensor, chosen: Tensor, shift: Tensor | float) -> tuple[float, float]:
    """Share of samples on one side of both hyperplanes, and the correlation of the distances; 0 where the samples define none."""
    t = coordinates[:, 0]
    if len(chosen) < coordinates.shape[1] or t.std(correction=0) <= RANK * t.abs().max():
        return 0.0, 0.0
    found = through(coordinates, chosen[None])
    if not len(found):
        return 0.0, 0.0
    side = 0 if found.gates.vectors[0, 0] > 0 else 1
    scores = coordinates @ found.gates.vectors[:, side] + found.gates.offsets[side] + shift
    if scores.std(correction=0) <= RANK * scores.abs().max():
        return 0.0, 0.0
    return ((scores > 0) == (t > 0)).double().mean().item(), torch.corrcoef(torch.stack([scores, t]))[0, 1].item()
