"""The fast transform against scipy's matrix."""

from __future__ import annotations

import hashlib

import pytest
import scipy.linalg
import torch

from lplr.kernels.hadamard import hadamard, rotate, rotation_signs


@pytest.mark.parametrize("p", [1, 2, 4, 8, 64, 256])
@pytest.mark.parametrize("lead", [(), (3,), (2, 5), (0,)])
def test_against_the_matrix(p: int, lead: tuple[int, ...], generator: torch.Generator) -> None:
    x = torch.randn(*lead, p, generator=generator, dtype=torch.float64)
    H = torch.from_numpy(scipy.linalg.hadamard(p)).double() * p**-0.5
    before = x.clone()
    y = hadamard(x)
    assert y.shape == x.shape and torch.equal(x, before)
    torch.testing.assert_close(y, x @ H, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(hadamard(y), x, rtol=1e-13, atol=1e-13)


def test_orthogonal_and_signed() -> None:
    H = hadamard(torch.eye(512, dtype=torch.float64))
    torch.testing.assert_close(H @ H.T, torch.eye(512, dtype=torch.float64), rtol=0, atol=1e-14)
    assert torch.equal(H.sign(), torch.from_numpy(scipy.linalg.hadamard(512)).double())


@pytest.mark.parametrize("d", [1, 2, 3, 5, 8, 48, 100, 288])
def test_rotation_is_orthogonal_for_any_size(d: int, generator: torch.Generator) -> None:
    signs = rotation_signs(7, d)
    O = rotate(torch.eye(d, dtype=torch.float64), signs)  # noqa: E741
    torch.testing.assert_close(O @ O.T, torch.eye(d, dtype=torch.float64), rtol=0, atol=1e-14)
    x = torch.randn(4, d, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(rotate(x, signs), x @ O, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rotate(x, signs, inverse=True), x @ O.T, rtol=1e-12, atol=1e-12)


def test_rotation_by_its_formula() -> None:
    """O = D_1 (H_4 (+) I) D_2 (I (+) H_4) for d = 6, built densely."""
    signs = rotation_signs(3, 6)
    H = torch.from_numpy(scipy.linalg.hadamard(4)).double() / 2
    first, last = torch.block_diag(H, torch.eye(2)).double(), torch.block_diag(torch.eye(2), H).double()
    D1, D2 = torch.diag(signs[0].double()), torch.diag(signs[1].double())
    torch.testing.assert_close(rotate(torch.eye(6, dtype=torch.float64), signs), D1 @ first @ D2 @ last)


def test_rotation_signs_never_change() -> None:
    """Stored checkpoints rest on them."""
    signs = rotation_signs(1, 12)
    assert signs.dtype == torch.int8 and signs.shape == (2, 12) and set(signs.flatten().tolist()) == {-1, 1}
    raw = hashlib.shake_256(b"lplr rotation 1 12").digest(24)
    assert signs.flatten().tolist() == [2 * (byte & 1) - 1 for byte in raw]


def test_strided_input(generator: torch.Generator) -> None:
    x = torch.randn(16, 6, generator=generator).T
    torch.testing.assert_close(hadamard(x), hadamard(x.contiguous()))


@pytest.mark.parametrize("p", [0, 3, 6, 12])
def test_other_sizes_are_refused(p: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        hadamard(torch.zeros(2, p))
