"""The step that makes up for what happened to a layer's inputs: against least squares, and through the driver."""

from __future__ import annotations

from pathlib import Path

import checkpoints
import pytest
import torch
from torch import nn

from lplr.linalg.hessian import DAMPING, Hessian
from lplr.recipe import make_recipe
from lplr.stream import compress
from lplr.stream.calibrate import Activations
from lplr.stream.moments import Drift, InputMoments, Original, collect


def test_the_whole_step_is_ridge_regression_on_the_original_outputs(generator: torch.Generator) -> None:
    W = torch.randn(5, 7, generator=generator).double()
    before = torch.randn(300, 7, generator=generator)
    mixed = torch.eye(7) + 0.3 * torch.randn(7, 7, generator=generator)
    after = before @ mixed + 0.1 * torch.randn(300, 7, generator=generator)
    drift, hessian = Drift(7), Hessian(7)
    for rows in (slice(0, 100), slice(100, 300)):
        drift.add(before[rows], after[rows])
        hessian.add(after[rows])
    H = hessian.mean()
    assert H is not None and (step := drift.step(H)) is not None
    # min ||W (before - after)^T - S after^T||^2 / 300 + damping ||S||^2, as one least squares problem in numpy's sense
    ridge = (DAMPING * float(H.diagonal().mean())) ** 0.5 * torch.eye(7, dtype=torch.float64)
    left = torch.cat([after.double() / 300**0.5, ridge])
    right = torch.cat([(before - after).double() @ W.T / 300**0.5, torch.zeros(7, 5, dtype=torch.float64)])
    expected = torch.linalg.lstsq(left, right).solution.T
    assert torch.allclose(W @ step.double(), expected, atol=1e-4)  # sums in float32


class Block(nn.Module):
    """Two layers, the second of which a token may not reach."""

    def __init__(self, generator: torch.Generator, routed: bool) -> None:
        super().__init__()
        self.first, self.second, self.routed = nn.Linear(4, 6, bias=False), nn.Linear(6, 4, bias=False), routed
        for layer in (self.first, self.second):
            layer.weight = nn.Parameter(torch.randn(layer.weight.shape, generator=generator), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        return x + (self.second(h[:, :2]).sum(1, keepdim=True) if self.routed else self.second(h))


@pytest.mark.parametrize("routed", [False, True])
def test_collect_beside_the_original_block(routed: bool, generator: torch.Generator) -> None:
    block = Block(generator, routed)
    inputs, originals = Activations(6, 3, 4), Activations(6, 3, 4)
    x, other = (torch.randn(6, 3, 4, generator=generator) for _ in range(2))
    inputs.set(slice(0, 6), x)
    originals.set(slice(0, 6), other)
    original = Original.of(block, originals)
    expected = block(other)
    block.first.weight.mul_(0.5)  # what is done to the block does not reach the original
    found = collect(block, {"b": block.second}, inputs, {}, torch.device("cpu"), original, last=True)
    H, step = found.of("b")
    assert H is not None and (step is None) == routed  # routed tokens may be others in the two models
    h, before = x @ block.first.weight.T, other @ original.block.first.weight.T
    if not routed:
        rows, moved = h.reshape(-1, 6), (before - h).reshape(-1, 6)
        assert torch.allclose(found.drifts["b"].total / 18, moved.T @ rows / 18, atol=1e-5)
    assert torch.allclose(originals.get(slice(0, 6)), expected, atol=1e-6)  # at the block's outputs
    assert torch.equal(inputs.get(slice(0, 6)), x)


def test_sums_over_several_batches_are_sums_over_all_rows(generator: torch.Generator) -> None:
    """In float64 by hand; q and k share an input, and still do when the batches are put together."""
    x, other = (torch.randn(11, 3, 4, generator=generator) for _ in range(2))

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.out = (nn.Linear(4, 4, bias=False) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.q(x) * self.k(x))

    inputs, originals = (Activations(11, 3, 4, at_once=3) for _ in range(2))
    inputs.set(slice(0, 11), x)
    originals.set(slice(0, 11), other)
    assert len(list(inputs.batches())) == 11
    block = Two().requires_grad_(False)
    original = Original.of(block, originals)
    expected = block(other)
    layers = {"a": block.q, "b": block.k}
    found = collect(block, layers, inputs, {}, torch.device("cpu"), original, last=True)
    assert found.hessians["a"] is found.hessians["b"] and found.drifts["a"] is found.drifts["b"]
    assert found.hessians["a"].rows == found.drifts["a"].rows == 33
    wide, moved = x.double().reshape(-1, 4), (other - x).double().reshape(-1, 4)
    H = found.hessians["a"].mean()
    assert H is not None
    # 33 float32 products of numbers about one
    torch.testing.assert_close(H.double(), wide.T @ wide / 33, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.drifts["a"].total.double(), moved.T @ wide, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(originals.get(slice(0, 11)), expected)


@pytest.mark.parametrize("passes", [[{"b": 1}, {"a": 5, "b": 5}], [{"a": 5, "b": 5}, {"b": 1}], [{"a": 2}, {"a": 4, "b": 4}]])
def test_every_layer_gets_the_rows_that_it_saw_however_they_shared_them(passes: list[dict[str, int]]) -> None:
    """Layers with as many rows in a pass share an input there.  Failed once: with one seen alone before, its rows were lost."""
    moments = InputMoments({})
    for rows in passes:
        shared = {count: Hessian(3) for count in rows.values()}
        for count, hessian in shared.items():
            hessian.add(torch.ones(count, 3))
        moments.merge({name: shared[count] for name, count in rows.items()}, {})
    for name in ("a", "b"):
        seen = sum(rows.get(name, 0) for rows in passes)
        assert moments.hessians[name].rows == seen
        assert torch.equal(moments.hessians[name].upper.triu(), seen * torch.ones(3, 3).triu())


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_the_recipe_says_how_far(share: float, tmp_path: Path) -> None:
    source = checkpoints.write(tmp_path / "base", "llama")
    settings = {"model": str(source), "dataset": str(source / "text.txt"), "nsamples": 4, "seqlen": 32, "alternations": 0}
    settings |= {"bits": 3, "allocation": "uniform", "propagation": share}
    rows = compress.compress(make_recipe(settings), tmp_path / "out")
    assert any("target differs" in row.note for row in rows) == (share > 0)
    assert all(row.error <= row.certificate for row in rows)
