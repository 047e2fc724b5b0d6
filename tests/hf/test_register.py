"""Registration in fresh processes: both import orders, idempotent, and lazy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pico
import pytest

ROOT = Path(__file__).resolve().parents[2]
INSTALL = "from lplr.hf.register import install; install()"
LAZY = "\nimport sys; assert not {'torch', 'transformers'} & set(sys.modules)"
USED = "import transformers, transformers.quantizers.auto, transformers.modeling_utils"
LOAD = """
m = transformers.AutoModelForCausalLM.from_pretrained(FOLDER)
assert type(m.model.layers[0].mlp.up_proj).__name__ == "LowRankLinear", m
"""
ORDERS = {
    "lplr first": INSTALL + LAZY + "\nimport transformers" + LOAD,
    "transformers first": f"import transformers\n{INSTALL}" + LOAD,
    "transformers used first": f"{USED}\n{INSTALL}" + LOAD,
    "quantizer module first": "import lplr.hf.quantizer, transformers" + LOAD,
    "loader first": "import lplr.hf.load, transformers" + LOAD,
    "name imported first": f"from transformers import AutoModelForCausalLM\nimport transformers\n{INSTALL}" + LOAD,
    "twice": f"{INSTALL}\n{INSTALL}\nimport transformers" + LOAD + INSTALL + LOAD,
    "imported anew": f"{INSTALL}\nimport transformers, sys"
    + LOAD
    + f"\nfor k in [k for k in sys.modules if k.startswith('lplr')]: del sys.modules[k]\n{INSTALL}"
    + LOAD,
    "finder is gone": f"{INSTALL}\nimport transformers, sys"
    + LOAD
    + "assert not any(type(f).__name__ == '_Waiting' for f in sys.meta_path)",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico.write_compressed(pico.compress(pico.model("llama"))[0], tmp_path_factory.mktemp("compressed"))


@pytest.mark.parametrize("order", ORDERS)
def test_order(order: str, folder: Path) -> None:
    code = f"FOLDER = {str(folder)!r}\n{ORDERS[order]}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
