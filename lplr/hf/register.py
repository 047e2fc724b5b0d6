"""Make `from_pretrained` know the quant_method "lplr" and heads, without importing transformers before the user does.

transformers has no entry points for quantizers or models: a process registers its own in the tables of
`transformers.quantizers.auto` and of `transformers.models.auto.modeling_auto`.  When such a module is already there, `install`
registers at once.  Otherwise it waits: a finder on sys.meta_path sees the import of exactly that module, lets the usual finders
find it, registers after it has run, and takes itself away.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# module of transformers that holds the tables -> module of ours that registers when it is imported
_TARGETS = {
    "transformers.quantizers.auto": "lplr.hf.quantizer",
    "transformers.models.auto.modeling_auto": "lplr.hf.classifier",
}


def register() -> None:
    """Put LplrConfig and LplrQuantizer in the tables of transformers, which importing their module does."""
    import_module("lplr.hf.quantizer")  # when it is that module's own import that led here, it registers at its end


class _Waiting(MetaPathFinder):
    """Imports one of our modules after the import of its target."""

    def __init__(self, target: str) -> None:
        self.target = target

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The target's own spec with a loader that registers when it is done; None for any other module."""
        if fullname != self.target:
            return None
        others = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((found for found in others if found is not None), None)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            import_module(_TARGETS[self.target])

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]  # this loader serves this one import
        return spec


def install() -> None:
    """Register now where transformers has its tables, else as soon as it has.  `import lplr` calls it."""
    waiting = {finder.target for finder in sys.meta_path if isinstance(finder, _Waiting)}
    for target, ours in _TARGETS.items():
        if target in sys.modules:
            import_module(ours)
        elif target not in waiting:
            sys.meta_path.insert(0, _Waiting(target))
