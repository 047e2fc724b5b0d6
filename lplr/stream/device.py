"""Where to compute."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import psutil
import torch

from lplr.errors import RecipeError

CONTAINER = Path("/sys/fs/cgroup/memory.max")  # bytes that a container may use, "max" where there is no limit
KINDS = ("cpu", "cuda")  # others lack the float64 that the certificates need


def usable_device(name: str) -> torch.device:
    """The device of that name once a tensor was put there; RecipeError when it cannot be used."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in KINDS:
        raise RecipeError(f"device {name!r} cannot be used: choose cpu or cuda (cuda:1 for the second GPU)")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise RecipeError(f"device {name!r} cannot be used ({reason}): choose cpu, or install a torch that has it") from None
    return device


def memory_of(device: torch.device) -> int:
    """Bytes that the device has in all; of the processor's memory, what the control group of this process may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    told = CONTAINER.read_text().strip() if CONTAINER.is_file() else ""
    return min(psutil.virtual_memory().total, int(told) if told.isdigit() else 1 << 63)


def product_dtype(device: torch.device) -> torch.dtype:
    """The type of matrix products of models that are tuned: bfloat16 where the device has instructions for it, else float32."""
    if device.type == "cpu":
        faster = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        faster = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if faster else torch.float32


def autocast(device: torch.device) -> AbstractContextManager[object]:
    """Matrix products in `product_dtype`."""
    dtype = product_dtype(device)
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)
