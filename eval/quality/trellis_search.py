"""The search for the constants of the trellis codes (`lplr.kernels.trellis.reference.CODES`).

    python eval/quality/trellis_search.py [--widths 1 2 3] [--seconds 30]

For each width: random (A, B, shift) in two families (a multiplication alone, and multiply-shift-multiply), the best by
mean squared error on one short Gaussian sample; the best of those on longer ones (ROUNDS), for samples that are short choose by
luck; of the best four the best gain; then the start state of least mean cost-to-go.  What is printed goes into CODES by hand;
eval/quality/grids.py measures it on another sample.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import numpy as np

from lplr.kernels.trellis.cpu import by_last_symbol, viterbi
from lplr.kernels.trellis.reference import STATE_BITS, Code, book_of

STATES = 1 << STATE_BITS
STEPS = {0.5: (1, 2), 1.0: (1, 1), 1.5: (3, 2), 2.0: (2, 1), 2.5: (5, 2), 3.0: (3, 1), 3.5: (7, 2)} | {
    float(b): (b, 1) for b in (4, 5, 6)
}
GAINS = np.arange(0.96, 1.081, 0.01)
ROUNDS = ((400, 24_000), (40, 240_000))  # (candidates left, entries of the sample that ranks them)


def cost(c: Code, x: np.ndarray) -> float:
    """Mean squared error of the code on x (t, v)."""
    book, row = book_of(c).numpy(), x.reshape(1, -1)
    codes, values = np.empty((1, -(-len(x) * c.step_bits // 8)), np.uint8), np.empty_like(row)
    viterbi(c.step_bits, c.entries)(row, book, by_last_symbol(book, c.step_bits), c.start, codes, values, 0, 1)
    return float(np.square(row - values).mean())


def candidate(step_bits: int, entries: int, mixed: bool, rng: np.random.Generator) -> Code:
    """A code with random constants and the gain sqrt(1 - D) of rate-distortion theory."""
    odd = rng.integers(0, STATES, (entries, 2)) | 1
    hashes = tuple((int(a), int(b) if mixed else 1, int(rng.integers(3, 10)) if mixed else STATE_BITS) for a, b in odd)
    return Code(step_bits, entries, hashes, float(np.sqrt(1 - 4.0 ** (-step_bits / entries))), 0)


def best_start(c: Code, rng: np.random.Generator, length: int = 16, trials: int = 200) -> int:
    """The state from which a short sequence costs least on average."""
    book, ways = book_of(c).numpy(), 1 << c.step_bits
    following = ((np.arange(STATES)[:, None] << c.step_bits) | np.arange(ways)) & (STATES - 1)
    total = np.zeros(STATES)
    for _ in range(trials):
        to_go = np.zeros(STATES, np.float32)
        for _ in range(length):
            x = rng.standard_normal((c.entries, 1)).astype(np.float32)
            to_go = (np.square(book - x).sum(0) + to_go)[following].min(1)
        total += to_go
    return int(total.argmin())


def search(width: float, seconds: float) -> tuple[Code, float]:
    """The best code that was found and its error on samples that did not choose it."""
    rng = np.random.default_rng(int(2 * width))
    step_bits, entries = STEPS[width]

    def sample(n: int) -> np.ndarray:
        return rng.standard_normal((n // entries, entries)).astype(np.float32)

    x, found = sample(4800), []
    for mixed in (False, True):
        stop = time.monotonic() + seconds
        while time.monotonic() < stop:
            c = candidate(step_bits, entries, mixed, rng)
            found.append((cost(c, x), c))
    found.sort(key=lambda pair: pair[0])
    left = [c for _, c in found]
    for kept, length in ROUNDS:
        y = sample(length)
        left = sorted(left[:kept], key=lambda c: cost(c, y))
    fresh = sample(ROUNDS[-1][1])
    finals = [replace(c, gain=round(c.gain * g, 5)) for c in left[:4] for g in GAINS]
    chosen = min(finals, key=lambda c: cost(c, fresh))
    chosen = replace(chosen, start=best_start(chosen, rng))
    return chosen, float(np.mean([cost(chosen, sample(4800)) for _ in range(100)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=float, nargs="+", default=list(STEPS))
    parser.add_argument("--seconds", type=float, default=30.0, help="for each width and family")
    args = parser.parse_args()
    for width in args.widths:
        c, error = search(width, args.seconds)
        print(f"    {width}: Code({c.step_bits}, {c.entries}, {c.hashes}, {c.gain}, {c.start}),", flush=True)
        print(f"# {width} bits: {error:.5f}, {error * 4.0**width:.3f} times the limit", flush=True)


if __name__ == "__main__":
    main()
