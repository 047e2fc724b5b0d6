"""The `lplr` command.  One function a command, no logic: arguments in, library calls, tables out.

Tables go to stdout; progress, notes and errors go to stderr.
Exit status: 0 done, 2 a clear error on one line, 130 stopped by the user (nothing is lost: run the same command again).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

import lplr
from lplr import tables
from lplr.cli import heads, neurons
from lplr.errors import RecipeError
from lplr.recipe import METHOD_NAMES, WIDTHS, Recipe, load_recipe, make_recipe
from lplr.terminal import clear_errors, fail, notice, out, progress_bar

# read by OpenMP when torch is imported, which no command has done yet: threads that wait must not spin, or a second busy process
# on the machine slows every small operation down many times
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

app = typer.Typer(
    name="lplr",
    help="Make a language model small: about one bit a weight, with a proven error bound for every layer.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# argument and option of typer's own wrong-usage errors; the class itself is private in some of its versions
_UsageError: Any = typer.BadParameter.__bases__[0]

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A folder that `lplr compress` wrote.", show_default=False)]
Against = Annotated[
    str | None, typer.Option(metavar="BASE", help="The base model: folder, GGUF file or Hub id.", show_default=False)
]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Read a folder's pytorch_model.bin.", rich_help_panel="Dangerous options")
]
Tuning = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Tuning after rounding, of blocks and then of the whole model: balanced, best, or fast, which is none: "
        "below two bits its result is not usable. (balanced)",
        rich_help_panel="What to do (default: the recipe's, or the one shown)",
        show_default=False,
    ),
]
_SETTINGS, _RUN = "What to do (default: the recipe's, or the one shown)", "How to run"


def _default(field: str) -> str:
    value = Recipe.model_fields[field].default
    if value is None:
        return "from the budget" if field in ("rank", "factor_bits", "grid") else "the main branch"
    return ", ".join(value) if isinstance(value, tuple) else f"{value:g}" if isinstance(value, float) else str(value)


def _setting(name: str, text: str) -> Any:
    field = name.removeprefix("--").replace("-", "_")
    shown = f"{text} ({_default(field)})"
    return typer.Option(name, help=shown, rich_help_panel=_SETTINGS, show_default=False)


def _run_option(*names: str, text: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=_RUN, show_default=False)


@app.command()
def compress(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="A folder, a GGUF file, or a Hub id.", show_default=False)
    ] = None,
    output: Annotated[Path | None, _run_option("--output", "-o", text="Output folder (NAME-LPLR-BITSbpw).")] = None,
    recipe: Annotated[Path | None, _run_option("--recipe", text="A YAML recipe; flags override it.")] = None,
    bits: Annotated[float | None, _setting("--bits", "Budget per compressed weight, all overheads counted.")] = None,
    size: Annotated[str | None, _run_option("--size", text="Instead of --bits: the largest folder, such as 2GiB.")] = None,
    fit: Annotated[
        str | None, _run_option("--fit", text="Instead of --bits: memory for weights, cache and work space, such as 8GiB.")
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens that --fit leaves room for.", min=1, rich_help_panel=_RUN)] = 4096,
    allocation: Annotated[
        str | None, _setting("--allocation", "sensitivity: bits where the loss minds; uniform: the same for every matrix.")
    ] = None,
    method: Annotated[str | None, _setting("--method", f"{', '.join(('auto', *METHOD_NAMES))}.")] = None,
    grid: Annotated[str | None, _setting("--grid", f"Of Q, or without Q of L and R: {', '.join(WIDTHS)}.")] = None,
    dataset: Annotated[
        str | None, _setting("--dataset", "Calibration text: builtin, none, a text or jsonl file, a Hub dataset.")
    ] = None,
    nsamples: Annotated[int | None, _setting("--nsamples", "Calibration windows.")] = None,
    seqlen: Annotated[int | None, _setting("--seqlen", "Tokens a calibration window.")] = None,
    propagation: Annotated[
        float | None, _setting("--propagation", "Share of earlier matrices' errors that each one makes up for, 0 to 1.")
    ] = None,
    preset: Tuning = None,
    factor_bits: Annotated[int | None, _setting("--factor-bits", "Width of the entries of L and R.")] = None,
    rank: Annotated[int | None, _setting("--rank", "Rank of L R for every matrix.")] = None,
    sketch: Annotated[str | None, _setting("--sketch", "gaussian, srht or sparse.")] = None,
    rounding: Annotated[str | None, _setting("--rounding", "nearest or stochastic.")] = None,
    power_iterations: Annotated[int | None, _setting("--power-iterations", "Power iterations of the range finder.")] = None,
    alternations: Annotated[int | None, _setting("--alternations", "Rounds in which L and R are solved again.")] = None,
    seed: Annotated[int | None, _setting("--seed", "Seed of every random choice.")] = None,
    modules_to_not_convert: Annotated[
        list[str] | None, _setting("--modules-to-not-convert", "Modules to leave as they are; repeatable.")
    ] = None,
    revision: Annotated[str | None, _setting("--revision", "Branch, tag or commit on the Hub.")] = None,
    device: Annotated[str | None, _setting("--device", "Where to compute: cpu or cuda.")] = None,
    engine: Annotated[str, _run_option("--engine", text="local (shown), or ray: on a Ray cluster, the same bytes.")] = "local",
    dry_run: Annotated[bool, _run_option("--dry-run", text="Print size, bits, memory, time and ranks; do nothing.")] = False,
    no_resume: Annotated[bool, _run_option("--no-resume", text="Refuse a folder that holds a run.")] = False,
    push_to_hub: Annotated[str | None, _run_option("--push-to-hub", text="Publish the result as OWNER/NAME of the Hub.")] = None,
    private: Annotated[bool, _run_option("--private", text="Keep a repository that --push-to-hub makes now private.")] = False,
    allow_pickle: AllowPickle = False,
) -> None:
    """Compress a checkpoint into a folder that transformers loads.  A killed run goes on where it stopped."""
    flags = {k: v for k, v in locals().items() if k in Recipe.model_fields and v is not None}
    with clear_errors():
        settings = {**(load_recipe(recipe) if recipe else {}), **flags, **({"recovery": preset} if preset else {})}
        if "model" not in settings:
            raise RecipeError("no model given: name a folder, a GGUF file or a Hub id")
        chosen = _with_budget(make_recipe(settings), size, fit, context, bits is not None, allow_pickle)
        if dry_run:
            _dry_run(chosen, allow_pickle)
            return
        from lplr.stream.compress import compress as run

        folder = output or _default_folder(chosen)
        if private and not push_to_hub:
            raise RecipeError("--private tells how to publish: name the repository with --push-to-hub OWNER/NAME")
        if push_to_hub:
            from lplr.hf.push import create

            create(push_to_hub, private=private)
        with progress_bar("compress") as step:
            how = {"allow_pickle": allow_pickle, "engine": engine, "notify": notice, "progress": step}
            rows = run(chosen, folder, resume=not no_resume, **how)
        tables.summary(folder, rows)
        if push_to_hub:
            _push(folder, push_to_hub, private, None)


def _with_budget(recipe: Recipe, size: str | None, fit: str | None, context: int, given: bool, allow_pickle: bool) -> Recipe:
    """The recipe with the bits that a size or a device allows, where one is named."""
    if size is None and fit is None:
        return recipe
    if given or (size is not None and fit is not None):
        raise RecipeError("a budget is one of --bits, --size and --fit: give one of them")
    from lplr.stream.budget import bits_for_memory, bits_for_size, parse_size
    from lplr.stream.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(recipe.model, recipe.revision, notice, allow_pickle=allow_pickle)
    if size is not None:
        bits = bits_for_size(checkpoint, recipe, parse_size(size))
    else:
        bits = bits_for_memory(checkpoint, recipe, parse_size(fit or ""), context)
    notice(f"{size or fit} allows {bits:g} bits a weight")
    return recipe.model_copy(update={"bits": bits})


def _default_folder(recipe: Recipe) -> Path:
    path = Path(recipe.model).expanduser()
    name = path.resolve().name if path.exists() else recipe.model.rpartition("/")[2].rpartition(":")[2]
    return Path(f"{name.removesuffix('.gguf')}-LPLR-{recipe.bits:g}bpw")


def _dry_run(recipe: Recipe, allow_pickle: bool) -> None:
    from lplr.stream.checkpoint import open_checkpoint, plan_layers
    from lplr.stream.estimate import check_memory, estimate

    checkpoint = open_checkpoint(recipe.model, recipe.revision, notice, allow_pickle=allow_pickle)
    plans = plan_layers(checkpoint, recipe)
    tables.plan(plans, estimate(checkpoint, plans, recipe))
    try:
        check_memory(checkpoint, plans, recipe)
    except RecipeError as error:
        notice(f"this run would be refused: {error}")


@app.command("eval")
def evaluate(
    folders: Annotated[list[str], typer.Argument(metavar="DIR", help="Compressed folders, or any models.")],
    dataset: Annotated[
        str, typer.Option(help="Text: builtin:heldout, a text or jsonl file, or a Hub dataset.")
    ] = "builtin:heldout",
    against: Against = None,
    seqlen: Annotated[
        int | None, typer.Option(help="Tokens a window (2048, or the model's context).", show_default=False)
    ] = None,
    windows: Annotated[int | None, typer.Option(help="Use the first N windows only.", show_default=False)] = None,
    tasks: Annotated[
        str, typer.Option(help="Tasks of lm-eval too, such as lambada_openai,piqa,arc_easy.", show_default=False)
    ] = "",
    task_data: Annotated[
        Path | None, typer.Option(help="Folder with jsonl files of tasks, in place of the Hub.", show_default=False)
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Use the first N samples of each task only.", show_default=False)] = None,
    batch_size: Annotated[int, typer.Option(help="Windows, and samples of tasks, at once.", min=1)] = 1,
    speed: Annotated[
        bool, typer.Option("--speed", help="Measure tokens a second and peak memory too, in a process of its own.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the comparison (lplr-eval, if several DIR are given).")
    ] = None,
    device: Annotated[str, typer.Option(help="Where to compute: cpu or cuda.")] = "cpu",
) -> None:
    """Measure perplexity, distance from a base and accuracy on tasks; of a head, accuracy on labelled text.

    Several models make one table and one plot.  A killed run goes on where it stopped.
    """
    with clear_errors():
        from lplr.hf.classifier import is_head

        if len(folders) == 1 and is_head(folders[0]):
            from lplr.evaluate.classification import as_table as rows_of
            from lplr.evaluate.classification import evaluate_head

            with progress_bar("eval") as step:
                measured = evaluate_head(folders[0], dataset, device=device, progress=step)
            tables.facts(Path(folders[0]).name, rows_of(measured))
            return
        from lplr.evaluate.result import as_table, to_json
        from lplr.evaluate.run import Wanted, evaluate_folders

        names = tuple(filter(None, (name.strip() for name in tasks.split(","))))
        wanted = Wanted(dataset, seqlen, windows, names, task_data, limit, speed, batch_size, device)
        with progress_bar("eval") as step:
            results = evaluate_folders(folders, wanted, against, notify=notice, progress=step)
        if len(results) == 1:
            tables.facts(Path(folders[0]).name, as_table(results[0]))
        else:
            tables.comparison(results)
        if output is not None or len(results) > 1:
            from lplr.report.comparison import write_comparison

            written = write_comparison(output or Path("lplr-eval"), [to_json(r) for r in results])
            out.print(f"wrote {' and '.join(escape(str(path)) for path in written)}", soft_wrap=True)


for _name, _command in (("fit-head", heads.fit_head), ("prune-head", heads.prune_head), ("explain-head", heads.explain_head)):
    app.command(_name)(_command)
app.command("prune")(neurons.prune)


@app.command()
def inspect(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A folder, compressed or not, a GGUF file, or a Hub id.", show_default=False)
    ],
    bits: Annotated[float, typer.Option(help="Budget per weight.")] = 1.0,
    method: Annotated[str, typer.Option(help="Method whose rank is shown.")] = "auto",
    dataset: Annotated[
        str | None, typer.Option(help="Measure the allocation too: on builtin, none, a text or jsonl file.", show_default=False)
    ] = None,
    nsamples: Annotated[int, typer.Option(help="Windows to draw from the text.")] = 128,
    seqlen: Annotated[int, typer.Option(help="Tokens a window.")] = 512,
) -> None:
    """Show what each matrix is like, with --dataset the bits it would get; of a compressed folder, those it got."""
    with clear_errors():
        from lplr.stream.checkpoint import open_checkpoint, plan_layers
        from lplr.stream.inspect import inspect as look
        from lplr.stream.inspect import is_compressed, measured_losses, stored_losses

        if is_compressed(model):
            tables.losses(model, stored_losses(Path(model).expanduser()))
            return
        text = {} if dataset is None else {"dataset": dataset, "nsamples": nsamples, "seqlen": seqlen}
        recipe = make_recipe({"model": model, "bits": bits, "method": method, **text})
        checkpoint = open_checkpoint(model, None, notice)
        plans = plan_layers(checkpoint, recipe)
        columns = ("matrix", "shape", "norm", "stable rank", f"rank at {bits:g} bits", "energy captured")
        table = Table(*columns, title=escape(Path(model).name))
        with progress_bar("inspect") as step:
            for done, m in enumerate(look(checkpoint, plans), 1):
                step(float(done), float(len(plans)), m.plan.name)
                rank = str(m.plan.format.rank) if m.plan.format else "dense"
                shape = f"{m.plan.shape[0]} x {m.plan.shape[1]}"
                table.add_row(escape(m.plan.name), shape, f"{m.norm:.4g}", f"{m.stable_rank:.1f}", rank, f"{m.energy:.1%}")
            found = measured_losses(checkpoint, plans, recipe, notice, lambda share, s: step(share, 1.0, s)) if text else None
        out.print(table)
        if found is not None:
            tables.losses(model, found)


@app.command()
def verify(folder: Folder, against: Against = None, allow_pickle: AllowPickle = False) -> None:
    """Check every file and tensor of a compressed folder; with --against, every layer's error against its certificate."""
    with clear_errors():
        from lplr.stream.verify import verify as check

        with progress_bar("verify") as step:
            v = check(folder, against, allow_pickle=allow_pickle, progress=step)
        counts = f"{v.files} files, {v.tensors} tensors, {v.layers} layers, {v.bits_per_weight:.4f} bits per weight"
        out.print(f"{escape(str(folder))}: {counts}: intact", soft_wrap=True)
        if v.worst is not None:
            closest = f"the closest is {escape(v.worst_layer)}, error / certificate = {v.worst:.6f}"
            out.print(f"every certificate holds; {closest}", soft_wrap=True)


@app.command()
def push(
    folder: Folder,
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The repository of the Hub.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Keep a repository that is made now private.")] = False,
    revision: Annotated[str | None, typer.Option(help="A branch, made when it is missing (main).", show_default=False)] = None,
) -> None:
    """Publish a compressed folder on the Hugging Face Hub, with a card and a report.

    Run again, it goes on where it stopped.
    """
    with clear_errors():
        _push(folder, repo, private, revision)


def _push(folder: Path, repo: str, private: bool, revision: str | None) -> None:
    from lplr.ship.push import push as run

    with progress_bar("push") as step:
        address = run(folder, repo, private=private, revision=revision, notify=notice, progress=step)
    out.print(f"published: {escape(address)}", soft_wrap=True)


@app.command()
def export(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A compressed folder, or the Hub id of one.", show_default=False)],
    to: Annotated[str, typer.Option(help="dense (bfloat16), peft (NF4 and LoRA) or gguf (llama.cpp).", show_default=False)],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A new folder (NAME-TO).", show_default=False)] = None,
    gguf_type: Annotated[str, typer.Option(help="Of the matrices: q8_0, q5_1, q5_0, q4_1, q4_0, f16 or bf16.")] = "q8_0",
) -> None:
    """Write a compressed folder for another engine, and measure what that loses."""
    with clear_errors():
        from lplr.ship.export import as_table
        from lplr.ship.export import export as run

        target = output or Path(f"{Path(folder).name}-{to}")
        with progress_bar("export") as step:
            found = run(folder, to, target, gguf_type=gguf_type, notify=notice, progress=step)
        tables.facts(str(target), as_table(found))


@app.command()
def report(folder: Folder) -> None:
    """Write one self-contained HTML page about a compressed folder."""
    with clear_errors():
        from lplr.report.page import write_report

        out.print(f"wrote {escape(str(write_report(folder)))}", soft_wrap=True)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the compressed models and reports go.")] = Path(
        "lplr-demo"
    ),
    bits: Annotated[float, typer.Option(help="Budget of the model to show; a 1-bit one is shown beside it.")] = 4.0,
) -> None:
    """Compress SmolLM2-135M-Instruct from the package index, evaluate it, write the report, and let it speak."""
    with clear_errors():
        from lplr.demo import demo as run

        with progress_bar("demo") as step:
            shown = run(output, bits, notify=notice, progress=step)
        table = Table("", *(column for column, _ in shown.columns), title="SmolLM2-135M-Instruct on held-out text")
        for i, row in enumerate(shown.rows):
            table.add_row(row, *(escape(cells[i]) for _, cells in shown.columns))
        out.print(table)
        for line in shown.lines:
            out.print(escape(line), soft_wrap=True)


@app.callback(invoke_without_command=True)
def _main(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False
) -> None:
    if version:
        out.print(f"lplr {lplr.__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main() -> None:
    """Entry point of the console script: wrong usage, too, is one line and status 2."""
    try:
        status = app(standalone_mode=False)
    except _UsageError as error:
        command = error.ctx.command_path if error.ctx else "lplr"
        fail(f"{error.format_message().rstrip('.')}: see `{command} --help`")
        status = 2
    except BrokenPipeError:
        sys.stderr.close()  # or the interpreter would complain when it flushes
        status = 1
    sys.exit(status if isinstance(status, int) else 0)
