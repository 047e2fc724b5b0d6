"""The public surface: every name imports, and importing the package loads nothing heavy."""

from __future__ import annotations

import subprocess
import sys

import pytest

import lplr


@pytest.mark.parametrize("name", lplr.__all__)
def test_every_public_name_is_there(name: str):
    assert getattr(lplr, name) is not None
    assert name in dir(lplr)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'compres'"):
        _ = lplr.compres


def test_all_is_complete_and_without_doubles():
    assert len(lplr.__all__) == len(set(lplr.__all__))
    assert {"compress", "verify", "load", "factorize", "quantize", "error_bound", "Recipe", "LplrError"} <= set(lplr.__all__)


@pytest.mark.parametrize("statement", ["import lplr", "import lplr.cli"])
def test_import_loads_nothing_heavy(statement: str):
    heavy = "{'torch', 'transformers', 'safetensors', 'datasets', 'huggingface_hub', 'matplotlib', 'numpy'}"
    code = f"{statement}; import sys; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_transformers_knows_the_format_whichever_is_imported_first():
    check = "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as m; assert 'lplr' in m"
    for code in (f"import lplr; {check}", f"from transformers.quantizers import auto; import lplr; {check}"):
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
