"""Make `from_pretrained` know the quant_method "lplr", without importing transformers before the user does.

transformers has no entry points for quantizers: a process registers its own in the tables of
`transformers.quantizers.auto`.  When that module is already there, `install` registers at once.  Otherwise it
waits: a finder on sys.meta_path sees the import of exactly that module, lets the usual finders find it,
registers after it has run, and takes itself away.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_TARGET = "transformers.quantizers.auto"


def register() -> None:
    """Put LplrConfig and LplrQuantizer in the tables of transformers, which importing their module does."""
    import_module("lplr.hf.quantizer")  # when it is that module's own import that led here, it registers at its end


class _Waiting(MetaPathFinder):
    """Registers after the import of the target module."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The target's own spec with a loader that registers when it is done; None for any other module."""
        if fullname != _TARGET:
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
            register()

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]  # this loader serves this one import
        return spec


def install() -> None:
    """Register now if transformers has its tables, else as soon as it has.  `import lplr` calls it."""
    if _TARGET in sys.modules:
        register()
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())
