"""Optimizers by the names that recipes have for them."""

from __future__ import annotations

from importlib.metadata import version

import torch
from packaging.version import Version

from lplr.errors import BackendError


def optimizer_of(name: str) -> type[torch.optim.Optimizer]:
    """AdamW of torch (`adamw`), or of bitsandbytes with moments of 8 bits in blocks (`adamw_8bit`; Dettmers et al., "8-bit
    Optimizers via Block-wise Quantization", ICLR 2022).  Raises BackendError without that package, or with one that is too old
    for a CPU.
    """
    if name == "adamw":
        return torch.optim.AdamW
    try:
        from bitsandbytes.optim.adamw import AdamW8bit

        if Version(version("bitsandbytes")) < Version("0.50"):
            raise ImportError
    except ImportError:  # PackageNotFoundError is one
        raise BackendError(
            "optimizer: adamw_8bit needs the package bitsandbytes: pip install 'bitsandbytes>=0.50', or take adamw"
        ) from None
    return AdamW8bit
