"""The same bits whatever number of threads: of what is computed in one, and of what the library trusts to be so by itself."""

from __future__ import annotations

import ast
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lplr.linalg import alone

ROOT = Path(__file__).resolve().parents[2] / "lplr"
ALONE = {"cholesky", "cholesky_ex", "eigh", "eigvalsh", "eig", "qr", "svd", "svdvals", "inv", "solve", "lstsq", "pinv", "det"}


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def same(work: Callable[[], Tensor]) -> bool:
    """Whether the bits are the same in one, two and three threads."""
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(work().contiguous().flatten().view(torch.uint8))
    return all(torch.equal(found[0], other) for other in found[1:])


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


W = draw(601, 400)
S = W.T @ W / 600 + 0.1 * torch.eye(400)
C = torch.linalg.cholesky(S)


@pytest.mark.parametrize(
    "work",
    [
        lambda: alone.cholesky_ex(S)[0],
        lambda: alone.eigh(S)[1],
        lambda: alone.eigvalsh(S.double()),
        lambda: alone.qr(W)[0],
        lambda: alone.svd(W, full_matrices=False)[0],
        lambda: alone.svdvals(W.double()),
        lambda: alone.total(W),
        lambda: alone.total(W.double().square()),
        lambda: alone.mean(W),
    ],
)
def test_what_is_computed_in_one_thread(work: Callable[[], Tensor]):
    assert same(work)
    assert torch.get_num_threads() == 3  # as it was set


def test_the_care_is_needed_here():
    """On this machine, with this torch: otherwise the module could go."""
    torch.set_num_threads(2)
    assert not all(map(same, (lambda: torch.linalg.qr(W)[0], lambda: torch.linalg.eigvalsh(S.double()), lambda: W.sum())))


@pytest.mark.parametrize(
    "work",
    [
        lambda: W @ S,
        lambda: W.T @ W,
        lambda: W.double().T @ W.double(),
        lambda: W[:, :16].T @ W[:, 16:40],
        lambda: W @ S[0],
        lambda: torch.zeros(96, 400).addmm_(W[:, :96].T, W),
        lambda: torch.linalg.solve_triangular(C, W.T, upper=False),
        lambda: torch.cholesky_solve(W.T.contiguous(), C),
        lambda: torch.linalg.vector_norm(W),
        lambda: torch.linalg.vector_norm(W.double()),
        lambda: torch.linalg.vector_norm(W, dim=1),
        lambda: torch.linalg.vecdot(W, W),
        lambda: W.sum(0),
        lambda: W.sum(1),
        lambda: W.reshape(2, -1).sum(1),
        lambda: W.abs().mean(1),
        lambda: W.softmax(-1),
        lambda: torch.nn.functional.rms_norm(W, (400,)),
        lambda: torch.nn.functional.scaled_dot_product_attention(*3 * (W[:600].reshape(2, 4, 75, 400),), is_causal=True),
    ],
)
def test_what_needs_no_care(work: Callable[[], Tensor]):
    assert same(work)


def test_one_thread_is_of_this_thread_alone():
    torch.set_num_threads(3)
    inside, seen = threading.Event(), []

    def other() -> None:
        torch.set_num_threads(2)
        inside.wait(10)
        seen.append(torch.get_num_threads())

    thread = threading.Thread(target=other)
    thread.start()
    with alone.one_thread():
        inside.set()
        thread.join()
        assert torch.get_num_threads() == 1
    assert seen == [2] and torch.get_num_threads() == 3


@pytest.mark.parametrize("part", ["factor", "linalg", "quant", "stream"])
def test_no_factorization_stands_outside(part: str):
    for path in (ROOT / part).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ALONE:
                assert ast.unparse(node.func.value) == "alone", f"{path.name}:{node.lineno} {ast.unparse(node.func)}"
