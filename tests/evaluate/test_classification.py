"""Accuracy, NLL and calibration error against loops and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lplr.evaluate.classification import BINS, accuracy, calibration_error, nll


def case(n: int, C: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, C, generator=g).mul_(2).softmax(1), torch.randint(C, (n,), generator=g)


@pytest.mark.parametrize("n, C", [(1, 2), (7, 3), (500, 10)])
def test_against_the_library_of_record(n: int, C: int):
    metrics = pytest.importorskip("sklearn.metrics")
    p, y = case(n, C)
    assert accuracy(p, y) == pytest.approx(metrics.accuracy_score(y.numpy(), p.argmax(1).numpy()))
    known = p.double() / p.double().sum(1, keepdim=True)
    # float32 rows sum to one up to rounding
    assert nll(p, y) == pytest.approx(metrics.log_loss(y.numpy(), known.numpy(), labels=range(C)), rel=1e-6)


def test_calibration_error_by_a_loop():
    p, y = case(400, 4, 1)
    confidence, right = p.double().max(1).values.numpy(), (p.argmax(1) == y).numpy()
    total = 0.0
    for b in range(BINS):
        inside = (confidence > b / BINS) & (confidence <= (b + 1) / BINS)
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert calibration_error(p, y) == pytest.approx(float(total), rel=1e-9)
    sure = torch.eye(3)[torch.tensor([0, 1, 2, 2])]
    assert calibration_error(sure, torch.tensor([0, 1, 2, 2])) == 0 and calibration_error(sure, torch.tensor([1, 2, 0, 0])) == 1
    assert nll(sure, torch.tensor([1, 1, 2, 2])) == pytest.approx(-np.log(1e-300) / 4)
