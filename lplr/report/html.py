"""A page from a template of this folder, escaped, and written whole or not at all."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path
from typing import Any

from lplr.errors import OutputError


def rendered(template: str, **values: Any) -> str:
    """The page as text: every value is escaped but Markup, and one that is missing is an error."""
    import jinja2

    def source(name: str) -> str:
        return resources.files("lplr.report").joinpath(name).read_text(encoding="utf-8")

    # autoescape=True, not select_autoescape: the templates' suffix is .j2
    strict, loader = jinja2.StrictUndefined, jinja2.FunctionLoader(source)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=strict, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template(template).render(**values)


def write(path: Path, text: str) -> None:
    """Replace the file as a whole: a reader sees the old page or the new one."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OutputError(f"{path} cannot be written ({error.strerror}): check free space and permissions") from None
