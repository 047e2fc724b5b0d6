"""The API reference from the docstrings: python docs/reference.py OUT [MODULE ...]; all modules of lplr without a MODULE.

A module that cannot be imported, a public name that leads nowhere and an annotation that cannot be read are errors.
"""

from __future__ import annotations

import pkgutil
import sys
import warnings
from pathlib import Path

import pdoc

import lplr

# what pdoc remarks of things that are as they should be
EXPECTED = (
    "The module specification",  # a package without __all__ brings its modules itself
    "Error parsing type annotation ForwardRef",  # of a NamedTuple: shown as it is written
    "Cannot determine where",  # members that a private class has from one written in C
)


def modules() -> list[str]:
    """The package and every public module below it."""
    found = (module.name for module in pkgutil.walk_packages(lplr.__path__, "lplr."))
    return ["lplr", *(name for name in found if not any(part.startswith("_") for part in name.split(".")))]


def build(output: Path, chosen: list[str]) -> None:
    """Write one HTML page a module into `output`; the pages read nothing from the network."""
    for name in lplr.__all__:
        setattr(lplr, name, getattr(lplr, name))  # they come at their first use, and pdoc sees only what is there
    pdoc.render.configure(footer_text=f"lplr {lplr.__version__}")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="pdoc")
        for message in EXPECTED:
            warnings.filterwarnings("ignore", message)
        pdoc.pdoc(*chosen, output_directory=output)


if __name__ == "__main__":
    build(Path(sys.argv[1]), sys.argv[2:] or modules())
