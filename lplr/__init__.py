"""lplr: large language models made small, with an error bound for every layer.

`import lplr` lets `transformers` load compressed folders; what is heavy is imported at its first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lplr.hf.register import install

if TYPE_CHECKING:
    from lplr.errors import LplrError
    from lplr.factor import Factorization, Format, factorize
    from lplr.factor.bounds import Bound, error_bound
    from lplr.hf.load import load_model as load
    from lplr.hf.load import load_tokenizer
    from lplr.hf.peft import adaptable
    from lplr.nn.lowrank import LowRankLinear
    from lplr.quant import QTensor, quantize
    from lplr.recipe import FactorSpec, QuantSpec, Recipe, Rule
    from lplr.records import LayerRecord
    from lplr.report.page import write_report
    from lplr.stream.compress import compress
    from lplr.stream.verify import verify

__version__ = "0.1.0"

# public name -> (module, name there)
_PUBLIC = {
    "Bound": ("lplr.factor.bounds", "Bound"),
    "FactorSpec": ("lplr.recipe", "FactorSpec"),
    "Factorization": ("lplr.factor", "Factorization"),
    "Format": ("lplr.factor", "Format"),
    "LayerRecord": ("lplr.records", "LayerRecord"),
    "LowRankLinear": ("lplr.nn.lowrank", "LowRankLinear"),
    "LplrError": ("lplr.errors", "LplrError"),
    "QTensor": ("lplr.quant", "QTensor"),
    "QuantSpec": ("lplr.recipe", "QuantSpec"),
    "Recipe": ("lplr.recipe", "Recipe"),
    "Rule": ("lplr.recipe", "Rule"),
    "adaptable": ("lplr.hf.peft", "adaptable"),
    "compress": ("lplr.stream.compress", "compress"),
    "error_bound": ("lplr.factor.bounds", "error_bound"),
    "factorize": ("lplr.factor", "factorize"),
    "load": ("lplr.hf.load", "load_model"),
    "load_tokenizer": ("lplr.hf.load", "load_tokenizer"),
    "quantize": ("lplr.quant", "quantize"),
    "verify": ("lplr.stream.verify", "verify"),
    "write_report": ("lplr.report.page", "write_report"),
}

__all__ = [*_PUBLIC, "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'lplr' has no attribute {name!r}")
    module, attribute = _PUBLIC[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return __all__


install()
