"""Where to compute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path

import psutil
import torch

from lplr.errors import RecipeError

GROUPS, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
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
    """Bytes that the device has in all; of the processor's memory, what the control groups of this process may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return min((psutil.virtual_memory().total, *_limits()))


def _limits() -> Iterator[int]:
    """Bytes that the control groups of this process, the outer ones too, may use: those of version 2, and of version 1."""
    with suppress(OSError):
        for line in OWN_GROUPS.read_text().splitlines():
            _, controllers, own = line.split(":", 2)
            if controllers not in ("", "memory"):
                continue
            root, name = (GROUPS / "memory", "memory.limit_in_bytes") if controllers else (GROUPS, "memory.max")
            inner = root / own.strip("/")
            for folder in (inner, *inner.parents):
                with suppress(OSError, ValueError):  # not there, or "max"
                    yield int((folder / name).read_text())


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
