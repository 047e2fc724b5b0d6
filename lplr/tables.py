"""The tables that the command prints, each from what one library call returned."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from lplr.terminal import duration_text, out, size_text

if TYPE_CHECKING:
    from lplr.convex.explain import Explained
    from lplr.evaluate import EvalResult
    from lplr.records import LayerRecord
    from lplr.stream.checkpoint import LayerPlan
    from lplr.stream.estimate import Estimate
    from lplr.stream.inspect import Losses


def plan(plans: list[LayerPlan], e: Estimate) -> None:
    """What `--dry-run` tells: the plan of every matrix, and the totals."""
    table = Table("matrix", "shape", "method", "grid", "rank", "bits L/R/Q", "bits per weight", title="Plan")
    for p in plans:
        f, shape = p.format, f"{p.shape[0]} x {p.shape[1]}"
        if f is None:
            cells = "dense", "", "", "", f"{p.dense_bits / (p.shape[0] * p.shape[1]):g} ({p.reason})"
        else:
            widths = f"{f.l_bits:g}/{f.r_bits:g}/{f.q_bits:g}"
            cells = p.spec.method, ", ".join(f.grids()), str(f.rank), widths, f"{f.bits_per_weight:.4f}"
        table.add_row(escape(p.name), shape, *cells)
    out.print(table)
    if e.allocated:
        out.print(
            f"The bits of {e.allocated} matrices are allocated when the run has measured what they are worth: the plan shows "
            "equal ones, bits and size are upper bounds.",
            soft_wrap=True,
        )
    most = "at most " if e.allocated else ""
    facts = Table("whole model", "", title="Estimate (nothing was written)")
    facts.add_row("compressed weights", f"{e.weights:,} of {e.parameters:,}")
    facts.add_row("bits per weight, all-in", f"{most}{e.bits_per_weight:.4f}")
    facts.add_row("bits per parameter, whole model", f"{most}{e.bits_per_parameter:.3f}")
    facts.add_row("size", f"{size_text(e.source_bytes)} -> {most}{size_text(e.output_bytes)}")
    facts.add_row("weight files", f"{len(e.files)}, together {'about ' if most else ''}{sum(e.files.values()):,} bytes")
    facts.add_row("peak memory, about", size_text(e.memory_bytes))
    facts.add_row("on disk while it runs", size_text(e.disk_bytes))
    facts.add_row("time on this machine, about", duration_text(e.seconds))
    out.print(facts)


def summary(folder: Path, rows: list[LayerRecord]) -> None:
    """One table of the errors and bounds of every layer, and the totals."""
    from lplr import records

    columns = ("matrix", "rank", "bits per weight", "error", "certificate", "bound", "rank optimum", "output error")
    table = Table(*columns, title="Relative errors")
    for r in rows:
        unit = r.norm or 1.0
        cells = [r.error, r.certificate, r.bound, r.optimal]
        table.add_row(
            escape(r.name),
            str(r.rank) if r.stored == "compressed" else "dense",
            f"{r.bits_per_weight:.4f}",
            *(f"{c / unit:.4f}" if c is not None else "-" for c in cells),
            f"{r.weighted_error:.4f}" if r.weighted_error is not None else "-",
        )
    out.print(table)
    for r in rows:
        if r.stored == "dense":
            out.print(f"{escape(r.name)} stays dense: {escape(r.note)}", soft_wrap=True)
    done = records.read(folder / records.LEDGER)[-1]
    out.print(
        f"{escape(str(folder))}: {done['bits_per_weight']:.4f} bits per weight on {done['weights']:,} compressed weights, "
        f"{done['bits_per_parameter']:.3f} bits per parameter of the whole model, {size_text(done['bytes'])}",
        soft_wrap=True,
    )


def facts(title: str, rows: list[tuple[str, str]]) -> None:
    table = Table("measure", "value", title=escape(title))
    for measure, value in rows:
        table.add_row(measure, escape(value))
    out.print(table)


def rows(title: str, columns: Sequence[str], found: Sequence[Sequence[str]]) -> None:
    table = Table(*columns, title=escape(title))
    for row in found:
        table.add_row(*map(escape, row))
    out.print(table)


def neurons(found: Explained) -> None:
    """The neurons of a head, and the texts each is made of."""
    from lplr.report.neurons import made_of, sentence

    for neuron in found.neurons:
        out.print(f"[bold]Neuron {neuron['number']}[/]: {escape(sentence(neuron))}.", soft_wrap=True)
        table = Table("distance", "label", "text", title=escape(made_of(neuron)), title_justify="left")
        for part in ("samples", "open", "closed"):
            for text in neuron[part]:
                table.add_row(f"{text['distance']:+.3g}", escape(text["label"]), escape(text["text"]))
            table.add_section()
        out.print(table)
    linear = "" if found.linear_effect is None else f"; the linear part's effect is {found.linear_effect:.3g}"
    where = f"accuracy {found.accuracy:.4f} on {found.samples:,} texts of {escape(found.dataset)}"
    tables = "Each table: the texts that the neuron is made of, those deepest on its open side, those on its closed side."
    rest = "it is linear" if found.linear_effect is not None else "it gives every text the same answer"
    told = tables if found.neurons else f"The head has no neurons: {rest}."
    out.print(f"{found.network_neurons} neurons, {where}{linear}. {told}", soft_wrap=True)


def losses(model: str, found: Losses) -> None:
    """One table of the bits of every matrix, and of the loss predicted at them and at others."""
    from lplr.stream.inspect import SHOWN

    def cells(*losses: float | None) -> list[str]:
        return [f"{loss:.4g}" if loss is not None else "-" for loss in losses]

    if found.unit is None:
        out.print("No bits were allocated: --allocation uniform, or a method that has no curves.", soft_wrap=True)
    columns = ("matrix", "bits per weight", "loss", *(f"at {bits} bit{'s' * (bits > 1)}" for bits in SHOWN))
    unit = f", predicted loss in {found.unit}" if found.unit else ""
    table = Table(*columns, title=f"{escape(Path(model).name)}{unit}")
    for row in found.rows:
        table.add_row(escape(row.name), f"{row.bits:.4f}", *cells(row.loss, *row.at))
    table.add_section()
    table.add_row("all, as allocated and at equal bits", "", *cells(found.total, *found.at))
    out.print(table)


def comparison(results: list[EvalResult]) -> None:
    """One row a model, the base first; and one a task and model."""
    from lplr.evaluate.result import number, with_error

    first = results[0]
    title = f"{first.dataset}: {first.windows} windows of {first.seqlen:,} tokens, no BOS"
    columns = ("model", "bits per weight", "bytes", "perplexity", "ratio", "KL", "top-1", "certified KL, ratio")
    table = Table(*columns, title=escape(title))
    if first.base is not None and first.base_perplexity is not None:
        b = first.base
        cells = with_error(first.base_perplexity, first.base_nll_se), "1", "0", "100 %", ""
        table.add_row(escape(b.name), f"{b.bits_per_weight:.4f}", f"{b.bytes:,}", *cells)
    for r in results:
        sure = f"{r.certificate.kl_bound:.3g}, {r.certificate.ratio_bound:.4g}" if r.certificate else "-"
        top1 = "-" if r.top1 is None else f"{100 * r.top1:.2f} %"
        size = (f"{r.model.bits_per_weight:.4f}", f"{r.model.bytes:,}") if r.model else ("-", "-")
        cells = with_error(r.perplexity, r.nll_se), with_error(r.ratio, r.difference_se), number(r.kl), top1, sure
        table.add_row(escape(r.model.name if r.model else "-"), *size, *cells)
    out.print(table)
    if any(r.tasks for r in results):
        tasks = Table("model", "task, metric", "value, paired difference with its 95 % interval")
        for r in results:
            for task in r.tasks:
                for measure, value in task.table():
                    tasks.add_row(escape(r.model.name if r.model else "-"), escape(measure), escape(value))
        out.print(tasks)
