"""What a model takes on the disk, and which one it is: bytes, bits, and a digest of its weights."""

from __future__ import annotations

import hashlib
import platform
from importlib import metadata
from pathlib import Path

from pydantic import BaseModel, ConfigDict
from torch import nn

from lplr import records
from lplr.files import sha256
from lplr.hf.load import is_gguf
from lplr.records import LEDGER

PACKAGES = ("lplr", "torch", "transformers", "tokenizers", "lm_eval", "datasets")


class ModelFacts(BaseModel):
    """bytes: of the weights' files.  bits_per_weight: all stored bits of the compressed matrices over their entries, as in
    run.jsonl; of a model that lplr did not write, of the whole model.  sha256: of the ledger, which holds that of every file,
    or of the weights' files and config.json.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    kind: str  # lplr, safetensors or gguf
    sha256: str
    bytes: int
    parameters: int
    bits_per_weight: float
    bits_per_parameter: float


def model_facts(path: Path, model: nn.Module) -> ModelFacts:
    """Of a folder or GGUF file, and the model that was loaded from it."""
    name = path.resolve().name
    if (path / LEDGER).is_file():
        done = records.read(path / LEDGER)[-1]
        return ModelFacts(
            name=name,
            kind="lplr",
            sha256=done["ledger_sha256"],
            bytes=sum(f["bytes"] for file, f in done["files"].items() if file.endswith(".safetensors")),
            parameters=done["parameters"],
            bits_per_weight=done["bits_per_weight"],
            bits_per_parameter=done["bits_per_parameter"],
        )
    files = [path] if is_gguf(path) else sorted(path.glob("*.safetensors"))
    digest = hashlib.sha256("".join(sha256(file) for file in files).encode())
    if (path / "config.json").is_file():
        digest.update((path / "config.json").read_bytes())
    size, parameters = sum(file.stat().st_size for file in files), sum(p.numel() for p in model.parameters())
    bits = 8 * size / max(parameters, 1)
    kind = "gguf" if is_gguf(path) else "safetensors"
    return ModelFacts(
        name=name,
        kind=kind,
        sha256=digest.hexdigest(),
        bytes=size,
        parameters=parameters,
        bits_per_weight=bits,
        bits_per_parameter=bits,
    )


def versions() -> dict[str, str]:
    """Name -> version of what the figures depend on; what is not installed is left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # or run from a source tree that is not installed
            continue
    return found


def machine(device: str) -> str:
    """The processor that computed, in words."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads"
