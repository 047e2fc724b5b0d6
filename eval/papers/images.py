"""LPLR on images (NeurIPS 2023, section 4): Shepp-Logan and photographs, at 1 and 2 bits a pixel; B = 4, B' = 8.

    python eval/papers/images.py [--smoke] [--output FILE]

Shepp-Logan is scikit-image's phantom, resized to 1000 x 1000 as published; the photographs (Hubble's deep field, 872 x 1000, in
place of the published picture of Jupiter; a retina, 1411 x 1411, in place of the MRI scan; the cameraman, 512 x 512) are in
scikit-image's package, in grey.  Error: ||A - made||_F / ||A||_F.  The published log names no image for its three errors.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from four_methods import RESULTS, compare, rank_at, write

L_BITS, R_BITS = 4, 8
PAPER_RANKS = {1: 83, 2: 166}  # of Shepp-Logan
PAPER_ERRORS = {"lplr": 0.2397, "dsvd": 0.4969, "naive": 0.5323}  # artifacts/images/eval.log of the authors' repository


def images(smoke: bool) -> dict[str, np.ndarray]:
    from skimage import color, data, transform

    size = 64 if smoke else 1000
    found = {"shepp_logan": transform.resize(data.shepp_logan_phantom(), (size, size))}
    if not smoke:
        found["hubble"] = color.rgb2gray(data.hubble_deep_field())
        found["retina"] = color.rgb2gray(data.retina())
        found["camera"] = data.camera() / 255.0
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="one small image")
    parser.add_argument("--output", type=Path, default=RESULTS / "papers_images.json")
    args = parser.parse_args()
    rows = []
    for name, image in images(args.smoke).items():
        A = torch.from_numpy(np.ascontiguousarray(image)).double()
        for bits in (1, 2):
            rank = rank_at((A.shape[0], A.shape[1]), bits, L_BITS, R_BITS)
            if name == "shepp_logan" and not args.smoke and rank != PAPER_RANKS[bits]:
                raise SystemExit(f"rank {rank}, the paper has {PAPER_RANKS[bits]}: nothing is written")
            found = {method: facts for method, (_, facts) in compare(A, bits, L_BITS, R_BITS, fitted=True).items()}
            rows.append({"image": name, "shape": list(A.shape), "bits": bits, "rank": rank, "methods": found})
            told = ", ".join(f"{method} {facts['error']:.4f} ({facts['bits']:.3f} bits)" for method, facts in found.items())
            print(f"{name}, {bits} bit, rank {rank}: {told}", flush=True)
    told = ", ".join(f"{method} {value}" for method, value in PAPER_ERRORS.items())
    print(f"published, image not named: {told}; ranks {PAPER_RANKS[1]} and {PAPER_RANKS[2]} for Shepp-Logan")
    write(args.output, {"b": L_BITS, "b_prime": R_BITS, "paper": {"errors": PAPER_ERRORS, "ranks": PAPER_RANKS}, "rows": rows})


if __name__ == "__main__":
    main()
