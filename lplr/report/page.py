"""report.html: what a run did and what it is worth, on one page that needs nothing else.

Everything that comes from a file (names of tensors, settings, evaluation results) is data: the template escapes it,
and a missing or odd value is shown as a dash.  The only markup that enters unescaped is that of `lplr.report.plots`,
which draws numbers and no names.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from lplr.errors import OutputError
from lplr.files import write_text_atomic
from lplr.records import LEDGER, LayerRecord, bits_per_weight, layers, read
from lplr.report.evaluations import Evaluations, tables
from lplr.report.html import rendered
from lplr.report.network import kinds, network
from lplr.report.plots import error_limits, errors_of_kind, relative, spectra_of_kind
from lplr.report.text import DASH, finite, number, show, size, span

REPORT = "report.html"
TEMPLATE = "page.html.j2"
MOST_KINDS = 12
# the certificate is computed in float64 and the error in float32
ROUNDING = 1e-5


class Cell(NamedTuple):
    """A cell of the table: what it shows, and the number by which it sorts (None: by its text)."""

    text: str
    value: float | None = None


class Column(NamedTuple):
    """A column of the table of matrices."""

    title: str
    help: str
    cell: Callable[[LayerRecord], Cell]
    numeric: bool = True


def write_report(folder: Path) -> Path:
    """Write report.html from run.jsonl and every eval-*.json of the folder and of its heads, and return its path.

    Raises OutputError when the folder has no run.jsonl, one of these files is damaged, or the page cannot be written.
    """
    ledger = folder / LEDGER
    if not ledger.is_file():
        raise OutputError(f"{folder} has no {LEDGER}: name the folder that `lplr compress` wrote")
    try:
        entries = read(ledger)
        records = list(layers(entries))
    except ValidationError as error:
        raise OutputError(f"{ledger}: a layer record is damaged ({error.errors()[0]['msg']}): compress again") from None
    except OSError as error:
        raise OutputError(f"{ledger} cannot be read ({error.strerror}): check its permissions") from None
    evaluations = [(path.name, _evaluation(path)) for path in sorted(folder.glob("eval-*.json"))]
    heads = [(path.parent.name, _evaluation(path)) for path in sorted(folder.glob("heads/*/eval-*.json"))]
    html = render(entries, records, evaluations, heads)
    path = folder / REPORT
    write_text_atomic(path, html)
    return path


def render(
    entries: Sequence[dict[str, Any]], records: Sequence[LayerRecord], evaluations: Evaluations, heads: Evaluations = ()
) -> str:
    """The page as text."""
    run: dict[str, Any] = next((e for e in entries if e["kind"] == "run"), {})
    done: dict[str, Any] | None = next((e for e in entries if e["kind"] == "done"), None)
    calibration = _calibration(run, evaluations)
    return rendered(
        TEMPLATE,
        model=show(run.get("model")),
        warnings=_warnings(done, records, evaluations),
        headline=_headline(done or {}, records, evaluations, calibration),
        tables=tables(evaluations, heads),
        settings=_settings(run, done or {}, calibration),
        figures=_figures(records),
        network=network(records),
        allocation=_allocation(next((e for e in entries if e["kind"] == "allocation"), {})),
        columns=COLUMNS,
        rows=[[column.cell(r) for column in COLUMNS] for r in records],
        compressed=sum(r.stored == "compressed" for r in records),
        dense=sum(r.stored == "dense" for r in records),
    )


def _evaluation(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise OutputError(f"{path} is not the JSON of an evaluation: delete it, or run `lplr eval` again")
    return found


def _calibration(run: dict[str, Any], evaluations: Evaluations) -> dict[str, Any]:
    """What the run was calibrated on: as the run says, else as an evaluation says."""
    for owner in (run, *(e for _, e in evaluations)):
        if isinstance(owner.get("calibration"), dict):
            return owner["calibration"]
    return {}


def _calibration_sentence(calibration: dict[str, Any]) -> str:
    if not calibration.get("name"):
        return "no text (data-free)" if calibration else "a text that the run does not name"
    shape = f", {number(calibration.get('rows'))} windows of {number(calibration.get('seqlen'))} tokens"
    return show(calibration["name"]) + (shape if calibration.get("rows") else "")


def _warnings(done: dict[str, Any] | None, records: Sequence[LayerRecord], evaluations: Evaluations) -> list[str]:
    out = []
    if done is None:
        remedy = "run the same command again to go on"
        out.append(f"This run is not finished, matrices so far {len(records)}: {remedy}.")
    broken = [r.name for r in records if _breaks(r)]
    if broken:
        names = ", ".join(broken[:5]) + (" …" if len(broken) > 5 else "")
        out.append(f"Measured error above the certificate in {len(broken)} of the matrices: {names}. Run lplr verify.")
    for name, evaluation in evaluations:
        if evaluation.get("finite") is False:
            why = "a logit was NaN or a token of the text had probability zero"
            out.append(f"{name}: {why}; the perplexity is not finite.")
    return out


def _breaks(record: LayerRecord) -> bool:
    return record.stored == "compressed" and record.error > record.certificate + ROUNDING * record.norm


def _headline(
    done: dict[str, Any],
    records: Sequence[LayerRecord],
    evaluations: Evaluations,
    calibration: dict[str, Any],
) -> list[tuple[str, str, str]]:
    """(label, figure, explanation) of each number at the top."""
    compressed = [r for r in records if r.stored == "compressed"]
    weights = done.get("weights", sum(r.shape[0] * r.shape[1] for r in compressed))
    bits = done.get("bits_per_weight", bits_per_weight(records))
    total = math.sqrt(sum(r.norm**2 for r in compressed))
    error = math.sqrt(sum(r.error**2 for r in compressed)) / total if total else None
    held = sum(not _breaks(r) for r in compressed)
    parameters, stored = done.get("parameters"), done.get("bytes")
    within = f"{held} of {len(compressed)} within their certificate"
    return [
        ("Bits per weight", number(bits), f"of {number(weights, 12)} compressed weights, every stored bit counted"),
        *(_perplexity(e, calibration) for _, e in evaluations[:1]),
        ("Bits per parameter", number(done.get("bits_per_parameter")), f"of all {number(parameters, 12)} parameters"),
        ("Size of the weight files", size(stored), f"{number(stored, 15)} bytes on disk"),
        ("Relative error", number(error, 3), f"‖W − Ŵ‖ / ‖W‖ over all compressed matrices; {within}"),
    ]


def _perplexity(e: dict[str, Any], calibration: dict[str, Any]) -> tuple[str, str, str]:
    """The headline of one evaluation."""
    label, figure = "Perplexity", number(e.get("perplexity"))
    if e.get("base_perplexity") is not None:
        label, figure = "Perplexity, base → compressed", f"{number(e['base_perplexity'])} → {figure}"
    where = f"on {show(e.get('dataset'))}, context {number(e.get('seqlen'), 9)}"
    return label, figure, f"{where}; calibrated on {_calibration_sentence(calibration)}"


def _settings(run: dict[str, Any], done: dict[str, Any], calibration: dict[str, Any]) -> list[tuple[str, str]]:
    recipe = run.get("recipe")
    rows = [(str(k), show(v)) for k, v in recipe.items()] if isinstance(recipe, dict) else []
    rows += [(k, show(run[k])) for k in ("source", "fingerprint", "lplr") if k in run]
    if calibration:
        sha = calibration.get("sha256")
        rows.append(("calibration text", _calibration_sentence(calibration) + (f", sha256 {str(sha)[:12]}…" if sha else "")))
    if finite(done.get("seconds")) is not None:
        rows.append(("time", f"{number(done['seconds'], 3)} s"))
    return rows


def _figures(records: Sequence[LayerRecord]) -> dict[str, Any]:
    """The SVG of every plot with the name of its kind; the markup is our own and needs no escaping."""
    from markupsafe import Markup

    compressed = [r for r in records if r.stored == "compressed"]
    panels = kinds(compressed, MOST_KINDS)
    limits = error_limits(compressed)
    errors = [(k, Markup(errors_of_kind(rs, limits, f"e{i}")), _error_summary(rs)) for i, (k, rs) in enumerate(panels.items())]
    spectra = [(k, spectra_of_kind(rs, f"s{i}")) for i, (k, rs) in enumerate(kinds(records, MOST_KINDS).items())]
    return {
        "errors": errors,
        "spectra": [(k, Markup(svg)) for k, svg in spectra if svg is not None],
    }


def _allocation(line: dict[str, Any]) -> dict[str, str] | None:
    """What was predicted of the allocation; None where nothing was allocated."""
    if not isinstance(line.get("layers"), dict):
        return None
    return {"predicted": number(line.get("predicted")), "unit": show(line.get("unit"))}


def _error_summary(records: Sequence[LayerRecord]) -> str:
    """What a panel of errors shows, in words."""
    parts = []
    for field, word in (("error", "error"), ("certificate", "certificate"), ("bound", "bound"), ("optimal", "optimum")):
        values = [v for r in records if (v := relative(r, field)) is not None]
        parts.append(f"{word} {span(values)}" if values else f"no {word}")
    return f"{len(records)} matrices: {', '.join(parts)}"


def _numeric(read_value: Callable[[LayerRecord], float | None], digits: int = 4) -> Callable[[LayerRecord], Cell]:
    def cell(record: LayerRecord) -> Cell:
        value = read_value(record)
        return Cell(number(value, digits), finite(value))

    return cell


def _shape(record: LayerRecord) -> Cell:
    n, d = record.shape
    return Cell(f"{n} × {d}", float(n * d))


def _factor_bits(record: LayerRecord) -> Cell:
    widths = record.l_bits, record.r_bits, record.q_bits
    parts = [
        f"{letter}\u00a0{bits:g}" + (f"\u00a0{grid}" if grid != "uniform" else "")
        for letter, bits, grid in zip("LRQ", widths, record.grids, strict=True)
        if bits
    ]
    return Cell(" ".join(parts) or DASH)


COLUMNS = (
    Column("Matrix", "name in the model", lambda r: Cell(r.name or DASH), numeric=False),
    Column("Block", "number of the block of the model", _numeric(lambda r: r.block)),
    Column("Shape", "outputs × inputs", _shape),
    Column(
        "Method",
        "how it was factorized",
        lambda r: Cell(r.method if r.stored == "compressed" else "dense"),
        numeric=False,
    ),
    Column("Rank", "columns of L", _numeric(lambda r: r.rank, 9)),
    Column("Codes", "bits of a code of each factor, and its grid if not uniform", _factor_bits, numeric=False),
    Column("Bits", "stored bits per weight", _numeric(lambda r: r.bits_per_weight)),
    Column("Error", "measured, relative to the norm of the matrix", _numeric(lambda r: relative(r, "error"))),
    Column("Certificate", "upper bound of the error, relative", _numeric(lambda r: relative(r, "certificate"))),
    Column("Probes", "certificate from random probes, relative", _numeric(lambda r: relative(r, "probe_certificate"))),
    Column("Bound", "what the theorem promised beforehand, relative", _numeric(lambda r: relative(r, "bound"))),
    Column("Optimum", "best error at this rank without quantization, relative", _numeric(lambda r: relative(r, "optimal"))),
    Column("Output error", "relative error of the outputs on the calibration text", _numeric(lambda r: r.weighted_error)),
    Column("Seconds", "time it took", _numeric(lambda r: r.seconds, 3)),
    Column("Note", "what the method has to say", lambda r: Cell(r.note or DASH), numeric=False),
)
