"""Commands on heads: fit, prune, explain.  As in `lplr.cli`: arguments in, library calls, tables out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from lplr import tables
from lplr.errors import RecipeError
from lplr.terminal import clear_errors, notice, out, progress_bar


def fit_head(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A folder that `lplr compress` wrote, or any model's.")],
    dataset: Annotated[str, typer.Option(help="Labelled text: a jsonl, tsv or csv file, sst2, imdb, ag_news, or a Hub dataset.")],
    held_out: Annotated[
        str | None, typer.Option(help="Labelled text to compare on (a fifth of the dataset).", show_default=False)
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder of the head (DIR/heads/NAME).")] = None,
    pooling: Annotated[str, typer.Option(help="mean, last or attention: how tokens become one vector.")] = "mean",
    activation: Annotated[str, typer.Option(help="gated or relu.")] = "gated",
    gates: Annotated[int, typer.Option(help="Gates to draw: the programme is solved for these.", min=1)] = 64,
    lam: Annotated[str, typer.Option(help="Weight of the penalty: a number, or cv.")] = "cv",
    seqlen: Annotated[int, typer.Option(help="Tokens of a text that are read.", min=1)] = 256,
    limit: Annotated[int | None, typer.Option(help="Use the first N rows only.", min=1, show_default=False)] = None,
    like: Annotated[
        Path | None, typer.Option(help="A head whose settings and lambda to take: after recompression.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of gates and splits.")] = 0,
    device: Annotated[str, typer.Option(help="Where to run the model: cpu or cuda.")] = "cpu",
) -> None:
    """Train a classification head on a model, solved to a certified duality gap; keep it beside the model."""
    with clear_errors():
        from lplr.convex.heads import as_table
        from lplr.convex.heads import fit_head as run

        with progress_bar("fit-head") as step:
            found = run(
                folder,
                dataset,
                output=output,
                held_out=held_out,
                pooling=pooling,
                activation=activation,
                n_gates=gates,
                lam=_number(lam),
                seqlen=seqlen,
                limit=limit,
                like=like,
                seed=seed,
                device=device,
                progress=step,
            )
        tables.facts(found.folder, as_table(found))
        out.print(f"On the held-out text: {found.verdict}.", soft_wrap=True)


def prune_head(
    head: Annotated[Path, typer.Argument(metavar="HEAD", help="A folder that `lplr fit-head` wrote.", show_default=False)],
    dataset: Annotated[str, typer.Option(help="Labelled text, best that of the head: a fifth of it chooses the size.")],
    held_out: Annotated[
        str | None,
        typer.Option(help="Labelled text to report on, which chooses nothing (a fifth of the dataset).", show_default=False),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder of the new head (HEAD-pruned).")] = None,
    gates: Annotated[
        int | None, typer.Option(help="Keep so many gates, in place of choosing.", min=1, show_default=False)
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Use the first N rows only.", min=1, show_default=False)] = None,
    device: Annotated[str, typer.Option(help="Where to run the model: cpu or cuda.")] = "cpu",
) -> None:
    """Prune a head to fewer neurons and fit it again: accuracy against size, and the size that was chosen."""
    with clear_errors():
        from lplr.convex.prune_head import COLUMNS, as_table
        from lplr.convex.prune_head import prune_head as run
        from lplr.report.curves import write_pruning

        with progress_bar("prune-head") as step:
            found = run(head, dataset, held_out=held_out, output=output, limit=limit, gates=gates, device=device, progress=step)
        tables.rows(found.head.folder, COLUMNS, as_table(found))
        notice(f"{write_pruning(Path(found.head.folder))}: accuracy against size")
        sizes = f"{found.before} neurons before, {found.head.neurons} now"
        out.print(f"{sizes}. On the held-out text: {found.head.verdict}.", soft_wrap=True)


def explain_head(
    head: Annotated[Path, typer.Argument(metavar="HEAD", help="A folder that `lplr fit-head` wrote.", show_default=False)],
    dataset: Annotated[str, typer.Option(help="Labelled text: a jsonl, tsv or csv file, or a Hub dataset.", show_default=False)],
    neurons: Annotated[int, typer.Option(help="Neurons to tell about, the strongest first.")] = 8,
    samples: Annotated[int, typer.Option(help="Texts that a neuron is made of.")] = 4,
    limit: Annotated[int | None, typer.Option(help="Use the first N texts only.", show_default=False)] = None,
    device: Annotated[str, typer.Option(help="Where to compute: cpu or cuda.")] = "cpu",
) -> None:
    """Show the texts that the neurons of a head are made of, and write them beside it as one HTML page."""
    with clear_errors():
        from lplr.convex.explain import explain_head as run
        from lplr.report.neurons import write_explanation

        with progress_bar("explain-head") as step:
            found = run(head, dataset, neurons=neurons, samples=samples, limit=limit, device=device, progress=step)
        tables.neurons(found)
        out.print(f"wrote {escape(str(write_explanation(head)))}", soft_wrap=True)


def _number(lam: str) -> float | str:
    if lam == "cv":
        return lam
    try:
        return float(lam)
    except ValueError:
        raise RecipeError(f"--lam is {lam!r}: give a positive number, or cv") from None
