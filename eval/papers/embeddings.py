"""LPLR on embeddings (NeurIPS 2023, section 4): 3-NN classification of compressed rows; B = B' = 8, B_nq = 1, 2, 4.

    python eval/papers/embeddings.py --data FOLDER --embedder FOLDER
        [--sets imdb agnews mnist] [--cache FOLDER] [--smoke] [--output FILE]

imdb and agnews: mean-pooled states of a sentence encoder (all-MiniLM-L6-v2 here; the paper has BERT), at most 128 tokens, 2,000
training texts and at most 2,000 test texts; mnist: pixels of the first 8,000 and the last 2,000 test images.  Training and test
rows together are one matrix, which is compressed as it is.  The authors' scripts for CIFAR compress the training rows of each
class by themselves, which writes the labels into the bases; that is not done here.  Sets that are not named keep their figures
in the file.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from four_methods import OURS, PUBLISHED, RESULTS, compare, write

sys.path.insert(0, str(Path(__file__).parents[1] / "convex"))
from samples import chosen_texts, embedder_features, mnist

WIDTH, NEIGHBOURS, POOL = 8, 3, 2000
# of IMDb with BERT embeddings, B_nq = 1, 2, 4: accuracy in percent, relative Frobenius error; 75 % as it is
PAPER = {
    "lplr": {"accuracy": (73, 74, 75), "error": (0.313, 0.235, 0.148)},
    "lsvd": {"accuracy": (74, 74, 74), "error": (0.241, 0.178, 0.122)},
    "dsvd": {"accuracy": (75, 74, 75), "error": (0.229, 0.161, 0.098)},
    "naive": {"accuracy": (50, 50, 73), "error": (6.63, 1.016, 0.417)},
}


def rows_of(name: str, args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training rows and classes, test rows and classes."""
    if name == "mnist":
        X, y = mnist(args.data)
        first, last = (200, 50) if args.smoke else (8000, 2000)
        return X[:first], y[:first], X[-last:], y[-last:]
    texts, y, test, yt = chosen_texts(args.data, name, 60 if args.smoke else POOL)
    if args.smoke:
        test, yt = test[:20], yt[:20]
    return embedder_features(args.embedder, texts, args.cache), y, embedder_features(args.embedder, test, args.cache), yt


def kept(file: Path, header: dict[str, Any]) -> dict[str, Any]:
    """The sets that the file of results has already, where it was made with the same settings."""
    held = json.loads(file.read_text()) if file.is_file() else {}
    same = json.loads(json.dumps(header))
    return held["sets"] if {key: held.get(key) for key in same} == same else {}


def classified(made: np.ndarray, y: np.ndarray, yt: np.ndarray) -> dict[str, float]:
    from sklearn.metrics import f1_score
    from sklearn.neighbors import KNeighborsClassifier

    guess = KNeighborsClassifier(NEIGHBOURS).fit(made[: len(y)], y).predict(made[len(y) :])
    return {"accuracy": float((guess == yt).mean()), "f1": float(f1_score(yt, guess, average="macro"))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with imdb/, agnews/ and mnist_t10k/")
    parser.add_argument("--embedder", help="folder of the sentence encoder")
    parser.add_argument("--sets", nargs="+", default=["imdb", "agnews", "mnist"], choices=("imdb", "agnews", "mnist"))
    parser.add_argument("--cache", type=Path, default=Path("features"))
    parser.add_argument("--smoke", action="store_true", help="a few rows")
    parser.add_argument("--output", type=Path, default=RESULTS / "papers_embeddings.json")
    args = parser.parse_args()
    if args.embedder is None and set(args.sets) != {"mnist"}:
        parser.error("--embedder is needed for texts")
    header = {"b": WIDTH, "b_prime": WIDTH, "neighbours": NEIGHBOURS, "methods": [*PUBLISHED, *OURS], "paper": {"imdb": PAPER}}
    sets = kept(args.output, header)
    for name in args.sets:
        X, y, test, yt = rows_of(name, args)
        A = torch.from_numpy(np.vstack([X, test])).double()
        plain = classified(A.numpy(), y, yt)
        found: dict[str, Any] = {"shape": list(A.shape), "test": len(yt), "uncompressed": plain, "bits": {}}
        print(f"{name}, {A.shape[0]} x {A.shape[1]}, uncompressed: accuracy {plain['accuracy']:.3f}")
        for bits in (1, 2, 4):
            methods = compare(A, bits, WIDTH, WIDTH)
            found["bits"][bits] = {m: facts | classified(made.numpy(), y, yt) for m, (made, facts) in methods.items()}
            told = ", ".join(f"{m} {f['accuracy']:.3f} ({f['error']:.3f})" for m, f in found["bits"][bits].items())
            print(f"  {bits} bit: accuracy (error): {told}", flush=True)
        sets[name] = found
        write(args.output, {**header, "sets": sets})
    print("paper, IMDb with BERT, accuracy in % (error) at 1, 2, 4 bits; 75 uncompressed:")
    for method, figures in PAPER.items():
        print(f"  {method}: " + ", ".join(f"{a} ({e})" for a, e in zip(figures["accuracy"], figures["error"], strict=True)))


if __name__ == "__main__":
    main()
