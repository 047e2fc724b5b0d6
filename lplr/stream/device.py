"""Where to compute."""

from __future__ import annotations

import torch

from lplr.errors import RecipeError

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
