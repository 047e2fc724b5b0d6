"""These tests run where there is a GPU (`make test-gpu`), or with TRITON_INTERPRET=1 on the CPU, in a process of their own:
triton reads it when it is imported.  `tests/kernels/test_interpreted.py` does the latter; elsewhere they are not collected.
"""

from __future__ import annotations

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

collect_ignore_glob = [] if INTERPRETED or torch.cuda.is_available() else ["test_*.py"]


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run."""
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(scope="session", autouse=True)
def _bfloat16_in_the_interpreter() -> None:
    """Triton 3.9's interpreter multiplies the bits of bfloat16 tensors in `tl.dot`: give it their values."""
    if not INTERPRETED:
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    def values(handle: interpreter.TensorHandle) -> interpreter.TensorHandle:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        wide = (handle.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(wide, tl.float32)

    original = interpreter.InterpreterBuilder.create_dot

    def create_dot(self, a, b, *rest):
        return original(self, values(a), values(b), *rest)

    interpreter.InterpreterBuilder.create_dot = create_dot
