"""The plots of the page as inline SVG.

Colours are stand-ins that become CSS variables, so that one drawing serves light and dark pages; text stays text and
takes the page's colour.  No name of a layer is drawn: names stand in the HTML, where the template escapes them.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from lplr.records import LayerRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

# stand-in colour in the drawing -> what the page uses
_COLOURS = {
    "#010101": "currentColor",
    "#010102": "var(--grid)",
    "#010103": "var(--error)",
    "#010104": "var(--certificate)",
    "#010105": "var(--bound)",
    "#010106": "var(--optimal)",
}
_INK, _GRID, _ERROR, _CERTIFICATE, _BOUND, _OPTIMAL = _COLOURS

# field of the record, colour, marker, line, width; drawn in this order: the measured error lies on top, and the
# certificate, which may be next to it, is broad enough to be seen beneath
_SERIES = (
    ("bound", _BOUND, "v", ":", 1.2),
    ("certificate", _CERTIFICATE, "", "-", 4.5),
    ("optimal", _OPTIMAL, "s", "-.", 1.2),
    ("error", _ERROR, "o", "-", 1.2),
)
# of classes, in turn
CLASSES = ((_ERROR, "o"), (_CERTIFICATE, "^"), (_OPTIMAL, "s"), (_BOUND, "D"))
_MARKED = 150  # above that many points a marker on each only blurs the line
_CURVES = 12  # spectra in one panel
_PANEL = (3.7, 2.5)  # inches


def errors_of_kind(records: Sequence[LayerRecord], limits: tuple[float, float] | None, slug: str) -> str:
    """Error, certificate, bound and optimum relative to ||W||_F, one matrix after the other, on a logarithmic axis."""

    def draw(axes: Axes) -> None:
        x = range(1, len(records) + 1)
        marker_size = 3.5 if len(records) <= _MARKED else 0
        for field, colour, marker, line, width in _SERIES:
            y = [relative(r, field) for r in records]
            drawn = [math.nan if v is None or v <= 0 else v for v in y]
            axes.plot(x, drawn, line, color=colour, marker=marker, markersize=marker_size, linewidth=width)
        axes.set_yscale("log")
        if limits is not None:
            axes.set_ylim(*limits)
        plain_ticks(axes.yaxis)
        axes.set_xlabel("matrix, in model order")
        axes.set_ylabel("relative to ‖W‖")
        _whole_numbers(axes)

    return _drawing(draw, slug)


def error_limits(records: Iterable[LayerRecord]) -> tuple[float, float] | None:
    """One range for every error panel, so that panels compare; None without a positive value."""
    found = [v for r in records for field, *_ in _SERIES if (v := relative(r, field)) is not None and v > 0]
    return (min(found) / 1.4, max(found) * 1.4) if found else None


def relative(record: LayerRecord, field: str) -> float | None:
    """A norm of the record over the norm of its matrix; None where there is none or the matrix is not compressed."""
    value = getattr(record, field)
    if value is None or record.stored != "compressed" or not record.norm > 0:
        return None
    return value / record.norm


def spectra_of_kind(records: Sequence[LayerRecord], slug: str) -> str | None:
    """Singular values over the largest one, both axes logarithmic; the later the matrix, the stronger its line.

    A dot is the last singular value that the rank keeps.  None when no record carries a spectrum.
    """
    have = [r for r in records if any(value > 0 for _, value in r.spectrum)]
    if not have:
        return None
    step = max(1, (len(have) - 1) / (_CURVES - 1))
    drawn = [have[round(k * step)] for k in range(min(len(have), _CURVES))]

    def draw(axes: Axes) -> None:
        for k, record in enumerate(drawn, 1):
            points = [(i, value) for i, value in record.spectrum if value > 0]
            top = max(value for _, value in points)
            curve = [(i, value / top) for i, value in points]
            axes.plot(*zip(*curve, strict=True), "-", color=_ERROR, alpha=0.25 + 0.75 * k / len(drawn), linewidth=1.2)
            kept = [(i, value) for i, value in curve if i <= record.rank]
            if kept and record.stored == "compressed":
                axes.plot(*kept[-1], "o", color=_CERTIFICATE, markersize=3.5)
        axes.set_xscale("log")
        axes.set_yscale("log")
        plain_ticks(axes.xaxis)
        plain_ticks(axes.yaxis)
        axes.set_xlabel("index i")
        axes.set_ylabel("σᵢ / σ₁")

    return _drawing(draw, slug)


def neuron(x: Sequence[float], y: Sequence[float], classes: Sequence[int], own: Sequence[tuple[float, float]],
           labels: tuple[str, str], slug: str) -> str:  # fmt: skip
    """Samples by class, the hyperplane at x = 0, and rings round those that the neuron is made of."""

    def draw(axes: Axes) -> None:
        axes.axvline(0, color=_INK, linewidth=1, linestyle="--")
        for c in sorted(set(classes)):
            colour, marker = CLASSES[c % len(CLASSES)]
            points = [(a, b) for a, b, of in zip(x, y, classes, strict=True) if of == c]
            axes.plot(*zip(*points, strict=True), marker, color=colour, markersize=3, alpha=0.6, markeredgewidth=0)
        if own:
            axes.plot(*zip(*own, strict=True), "o", color=_INK, markersize=8, markerfacecolor="none")
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])

    return _drawing(draw, slug)


def accuracy_of_sizes(points: Sequence[tuple[int, float, float]], chosen: int, slug: str) -> str:
    """Accuracy on samples kept apart (dots) and held-out ones (squares) of (size, apart, held out) points; the chosen size."""

    def draw(axes: Axes) -> None:
        sizes = [size for size, _, _ in points]
        axes.plot(sizes, [apart for _, apart, _ in points], "o-", color=_ERROR, markersize=4, linewidth=1.2)
        axes.plot(sizes, [held for _, _, held in points], "s-.", color=_OPTIMAL, markersize=4, linewidth=1.2)
        axes.axvline(chosen, color=_CERTIFICATE, linewidth=1.5, linestyle="--")
        axes.set_xlabel("gates")
        axes.set_ylabel("accuracy")
        _whole_numbers(axes)

    return _drawing(draw, slug)


def before_and_after(points: Sequence[tuple[int, float, float]], slug: str) -> str:
    """Held-out error of each block before it was tuned (triangles) and after (dots), from (block, before, after)."""

    def draw(axes: Axes) -> None:
        blocks = [block for block, _, _ in points]
        axes.plot(blocks, [before for _, before, _ in points], "v:", color=_BOUND, markersize=3.5, linewidth=1.2)
        axes.plot(blocks, [after for _, _, after in points], "o-", color=_ERROR, markersize=3.5, linewidth=1.2)
        axes.set_xlabel("block")
        axes.set_ylabel("held-out error")
        _whole_numbers(axes)

    return _drawing(draw, slug)


def course(losses: Sequence[float], slug: str) -> str:
    """A held-out loss at the start and after each pass."""

    def draw(axes: Axes) -> None:
        axes.plot(range(len(losses)), losses, "o-", color=_ERROR, markersize=4, linewidth=1.2)
        axes.set_xlabel("passes over the text")
        axes.set_ylabel("held-out divergence")
        _whole_numbers(axes)

    return _drawing(draw, slug)


def lengths_of_path(lams: Sequence[float], lengths: Sequence[Sequence[float]], slug: str) -> str:
    """Lengths of the weights of every gate, a row for each penalty, against the penalty, largest first, on a logarithmic axis."""

    def draw(axes: Axes) -> None:
        for curve in zip(*lengths, strict=True):
            if any(curve):
                axes.plot(lams, curve, "-", color=_ERROR, alpha=0.6, linewidth=1.0)
        axes.set_xscale("log")
        axes.invert_xaxis()
        plain_ticks(axes.xaxis)
        axes.set_xlabel("λ")
        axes.set_ylabel("‖Uᵢ‖")

    return _drawing(draw, slug)


def plain_ticks(axis: Axis, base: int = 10) -> None:
    """Plain numbers on a logarithmic axis: matplotlib's powers are markup that stays text here."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = sorted(axis.get_view_interval())
    # within a decade or two the powers alone are too few
    steps = (1.0, 2.0, 5.0) if base == 10 and low > 0 and high < 50 * low else (1.0,)
    axis.set_major_locator(LogLocator(base=base, subs=steps, numticks=8))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _whole_numbers(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))


def _drawing(draw: Callable[[Axes], None], slug: str) -> str:
    """Draw on fresh axes and return the <svg> element, hidden from screen readers: its figure tells what it shows."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "lplr",
        "font.size": 9,
        "text.parse_math": False,
        "axes.unicode_minus": False,
        "text.color": _INK,
        "axes.labelcolor": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "axes.edgecolor": _GRID,
        "grid.color": _GRID,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=_PANEL, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.grid(True, which="major", linewidth=0.6)
        draw(axes)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(out.getvalue(), slug)


def _inline(svg: str, slug: str) -> str:
    """The <svg> element of a file, its ids made the figure's own, its size left to the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{slug}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{slug}-", svg)
    head, rest = svg.split(">", 1)
    head = re.sub(r' (width|height|version)="[^"]*"', "", head) + ' aria-hidden="true" focusable="false"'
    rest = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", rest)  # the family is the page's
    for stand_in, colour in _COLOURS.items():
        rest = rest.replace(stand_in, colour)
    return f"{head}>{rest}".strip()
