"""`lplr prune`.  As in `lplr.cli`: arguments in, library calls, tables out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lplr import tables
from lplr.recipe import make_recipe
from lplr.terminal import clear_errors, notice, progress_bar


def prune(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A dense model: a folder, a GGUF file, or a Hub id.", show_default=False)
    ],
    neurons: Annotated[
        str, typer.Option(help="How many neurons of each MLP go: a share such as 10%, or a number.", show_default=False)
    ],
    by: Annotated[str, typer.Option(help="How neurons are chosen: activation, elimination or magnitude.")] = "activation",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A new folder (NAME-pruned).", show_default=False)] = None,
    dataset: Annotated[str, typer.Option(help="Calibration text: builtin, a text or jsonl file, a Hub dataset.")] = "builtin",
    nsamples: Annotated[int, typer.Option(help="Calibration windows.", min=1)] = 128,
    seqlen: Annotated[int, typer.Option(help="Tokens a calibration window.", min=8)] = 512,
    propagation: Annotated[
        float, typer.Option(help="Share of what pruned blocks do to later ones that these make up for, 0 to 1.", min=0, max=1)
    ] = 0.5,
    seed: Annotated[int, typer.Option(help="Seed of the windows.", min=0)] = 0,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.", show_default=False)] = None,
    device: Annotated[str, typer.Option(help="Where to compute: cpu or cuda.")] = "cpu",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print size, memory and time; do nothing.")] = False,
) -> None:
    """Take neurons out of the gated MLPs of a dense model and refit what is left: a smaller plain model, to compress next."""
    with clear_errors():
        from lplr.stream import neurons as stream

        settings = {"model": model, "dataset": dataset, "nsamples": nsamples, "seqlen": seqlen, "propagation": propagation}
        recipe = make_recipe({**settings, "seed": seed, "revision": revision, "device": device})
        path = Path(model).expanduser()
        name = path.resolve().name if path.exists() else model.rpartition("/")[2].rpartition(":")[2]
        target = output or Path(f"{name.removesuffix('.gguf')}-pruned")
        if dry_run:
            from lplr.stream.checkpoint import open_checkpoint

            plan = stream.planned(open_checkpoint(model, revision, notice), recipe, neurons)
            tables.facts(f"{name} (nothing was written)", stream.as_table(plan))
            return
        with progress_bar("prune") as step:
            made = stream.prune(recipe, neurons, target, selection=by, notify=notice, progress=step)
        tables.facts(str(target), stream.as_table(made.plan, made))
