"""A page from a template of this folder, escaped."""

from __future__ import annotations

from importlib import resources
from typing import Any


def rendered(template: str, **values: Any) -> str:
    """The page as text: every value is escaped but Markup, and one that is missing is an error."""
    import jinja2

    def source(name: str) -> str:
        return resources.files("lplr.report").joinpath(name).read_text(encoding="utf-8")

    # autoescape=True, not select_autoescape: the templates' suffix is .j2
    strict, loader = jinja2.StrictUndefined, jinja2.FunctionLoader(source)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=strict, trim_blocks=True, lstrip_blocks=True)
    text = environment.get_template(template).render(**values)
    return text.encode("utf-8", "replace").decode()  # JSON may hold half of a surrogate pair, which no file can
