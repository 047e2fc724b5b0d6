"""The Triton trellis encoder against the torch one: the same bytes."""

from __future__ import annotations

import pytest
import torch

from lplr.kernels.trellis import Feedback, gpu, reference


@pytest.mark.parametrize("bits", reference.WIDTHS)
@pytest.mark.parametrize(("m", "n"), [(3, 1), (35, 2), (2, 23), (1, 40), (2, 0), (0, 5)])
def test_encodes_as_the_reference(bits: float, m: int, n: int, device: torch.device) -> None:
    x = torch.randn(m, n, generator=torch.Generator().manual_seed(n)).to(device)
    codes, values = gpu.encode(x, bits)
    expected, points = reference.encode(x, bits)
    assert torch.equal(codes, expected) and torch.equal(values, points)


@pytest.mark.parametrize("bits", [0.5, 1.0, 2.0, 3.5])
def test_feedback_is_that_of_the_reference(bits: float, device: torch.device) -> None:
    """Numbers whose products and sums are exact in float32 in any order."""
    g, n = torch.Generator().manual_seed(3), 67
    x = ((torch.randn(3, n, generator=g) * 64).round() / 64).to(device)
    U = torch.eye(n) + (torch.rand(n, n, generator=g) * 8 - 4).round().div(16).triu(1)
    for a in range(0, n, 32):
        U[a : a + 32, a : a + 32] = torch.eye(min(32, n - a))
    feedback = Feedback(U.to(device), (2.0 ** torch.randint(-2, 3, (n,), generator=g)).to(device), 32)
    codes, values = gpu.encode(x, bits, feedback)
    expected, points = reference.encode(x, bits, feedback)
    assert torch.equal(codes, expected) and torch.equal(values, points)


def test_more_sequences_than_fit_at_once_are_encoded_in_turns(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(7, 9, generator=torch.Generator().manual_seed(0)).to(device)
    expected, _ = reference.encode(x, 2.0)
    monkeypatch.setattr(gpu, "SCRATCH", 3 * 9 * 1024)
    assert torch.equal(gpu.encode(x.T.contiguous().T, 2.0)[0], expected)


@pytest.mark.filterwarnings("ignore:overflow")  # of the interpreter's numpy
@pytest.mark.parametrize("bits", [0.5, 1.0, 2.0])
def test_what_is_not_a_number_gives_some_path(bits: float, device: torch.device) -> None:
    x = torch.randn(4, 21, generator=torch.Generator().manual_seed(3)).to(device)
    x[0, 5], x[1, 0], x[2, 20], x[3] = float("nan"), float("inf"), -1e30, 0.0
    codes, values = gpu.encode(x, bits)
    assert bool(values.isfinite().all()) and torch.equal(reference.decode(codes, bits, 21), values)
    assert torch.equal(codes[3], reference.encode(x[3:], bits)[0][0])
