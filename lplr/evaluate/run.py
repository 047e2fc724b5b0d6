"""Evaluate folders: load each and their base, read the text, measure, keep the result beside the model.

The text of C4 is the GPTQ line's: the first 1,100 documents of the validation part joined by a space, 256 windows of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lplr import records
from lplr.errors import OutputError, RecipeError
from lplr.evaluate.facts import ModelFacts, machine, model_facts, versions
from lplr.evaluate.kept import Kept, work_file
from lplr.evaluate.perplexity import evaluate
from lplr.evaluate.result import EvalResult, to_json
from lplr.evaluate.speed import measure_alone
from lplr.evaluate.tasks import TaskResult, TaskScores, compared
from lplr.files import write_text_atomic
from lplr.hf.hub import resolve
from lplr.hf.load import load_model, load_tokenizer
from lplr.hf.text import Text, evaluation_tokens, read_text
from lplr.records import LEDGER
from lplr.stream.device import usable_device

if TYPE_CHECKING:
    import torch

C4_DOCUMENTS, C4_WINDOWS = 1100, 256

Notify = Callable[[str], None]
Step = Callable[[float, float, str], None]


@dataclass(frozen=True)
class Wanted:
    """What to measure: text (see `lplr.hf.text`) and windows, tasks of lm-eval and where their samples are, speed; and how."""

    dataset: str = "builtin:heldout"
    seqlen: int | None = None
    max_windows: int | None = None
    tasks: tuple[str, ...] = ()
    task_data: Path | None = None
    limit: int | None = None
    speed: bool = False
    batch_size: int = 1
    device: str = "cpu"


@dataclass
class _Loaded:
    """A model in memory; facts are None of one that came without its folder, scores until it was tested on the tasks."""

    model: nn.Module
    path: Path | None = None
    facts: ModelFacts | None = None
    scores: list[TaskScores] | None = None


def evaluate_folder(
    folder: str,
    dataset: str,
    against: str | None = None,
    *,
    base: nn.Module | None = None,
    notify: Notify | None = None,
    progress: Step | None = None,
    **settings: Any,
) -> EvalResult:
    """Evaluate the model at `folder` (any model: folder, GGUF file, Hub id) in float32, beside its base.

    The base is `against`, or a model that is loaded already.  settings are those of `Wanted`.  A folder that `compress` wrote
    keeps the result as eval-<text>.json.  The tokenizer is the folder's own.  Raises the errors of `load_model`, `read_text` and
    `evaluate`, RecipeError for a device that cannot be used.
    """
    wanted = Wanted(dataset=dataset, **settings)
    given = None if base is None else _Loaded(nn.Module.to(base, usable_device(wanted.device)))
    return evaluate_folders([folder], wanted, against, base=given, notify=notify, progress=progress)[0]


def evaluate_folders(
    folders: Sequence[str],
    wanted: Wanted,
    against: str | None = None,
    *,
    base: _Loaded | None = None,
    notify: Notify | None = None,
    progress: Step | None = None,
) -> list[EvalResult]:
    """Evaluate models one after the other beside one base, which is loaded, and tested on the tasks, once.

    A killed run goes on where it stopped.  Keeps eval-<text>.json in each folder that `compress` wrote; raises as
    `evaluate_folder` does, and RecipeError for an unknown task or where lm-eval is missing.
    """
    tell, step = notify or (lambda _: None), progress or (lambda *_: None)
    usable_device(wanted.device)
    paths = [resolve(folder, notify=tell) for folder in folders]
    tasks = _tasks(wanted)
    if against is not None:
        base = _load(resolve(against, notify=tell), wanted)
    results, work = [], _Work(wanted, tasks, [])
    for i, path in enumerate(paths):
        name = path.resolve().name

        def told(done: float, total: float, what: str, i: int = i, name: str = name) -> None:
            step(i + done / total, float(len(paths)), f"{name}, {what}" if len(paths) > 1 else what)

        result = work.measure(_load(path, wanted), base, told)
        results.append(result)
        if (path / LEDGER).is_file():
            try:
                write_text_atomic(path / f"eval-{Text(result.dataset, [], '').slug}.json", to_json(result))
            except OutputError as error:  # the numbers are had: they are shown in any case
                tell(f"the result is not kept beside the model: {error}")
    work.done()
    return results


@dataclass
class _Work:
    """The measurements of a run, and the files of what is finished of them."""

    wanted: Wanted
    tasks: dict[str, Any]
    files: list[Kept]

    def measure(self, one: _Loaded, base: _Loaded | None, step: Step) -> EvalResult:
        started = datetime.now(UTC).isoformat(timespec="seconds")
        assert one.path is not None
        share = 0.5 if self.tasks else 1.0  # of the bar
        result = self._windows(one, base, lambda d, t, s: step(share * d / t, 1.0, s))
        outcomes: tuple[TaskResult, ...] = ()
        if self.tasks:
            half = share / 2 if base is not None and base.scores is None else share
            theirs: dict[tuple[str, str], TaskScores] = {}
            if base is not None:
                base.scores = base.scores or self._scores(
                    base, one, lambda d, t, s: step(share + half * d / t, 1.0, f"base, {s}")
                )
                theirs = {(s.task, s.metric): s for s in base.scores}
            one.scores = self._scores(one, one, lambda d, t, s: step(1 - half + half * d / t, 1.0, s))
            outcomes = tuple(compared(s, theirs.get((s.task, s.metric))) for s in one.scores)
        return result.model_copy(
            update={
                "model": one.facts,
                "base": base.facts if base else None,
                "tasks": outcomes,
                "speed": measure_alone(one.path, device=self.wanted.device) if self.wanted.speed else None,
                "machine": machine(self.wanted.device),
                "started": started,
            }
        )

    def done(self) -> None:
        for file in self.files:
            file.remove()

    def _windows(self, one: _Loaded, base: _Loaded | None, step: Step) -> EvalResult:
        wanted = self.wanted
        assert one.path is not None
        text, most = protocol_text(read_text(wanted.dataset, split="heldout"), wanted.max_windows)
        tokens = evaluation_tokens(load_tokenizer(one.path), text)
        facts = [text.sha256, tokens.sum().item(), tokens.numel(), wanted.seqlen, wanted.batch_size]
        return evaluate(
            one.model,
            tokens,
            seqlen=wanted.seqlen,
            max_windows=most,
            batch_size=wanted.batch_size,
            base=base.model if base else None,
            text=text,
            calibration=_calibration(one.path),
            kept=self._kept([one, *([base] if base else [])], ["windows", *facts]),
            progress=lambda done, total: step(float(done), float(total), f"window {done} of {total}"),
        )

    def _scores(self, one: _Loaded, owner: _Loaded, step: Step) -> list[TaskScores]:
        """On all tasks; the tokenizer is that of the model that is evaluated, for the base too."""
        from lplr.evaluate.zero_shot import score

        assert owner.path is not None
        kept = self._kept([one], ["answers", self.wanted.batch_size])
        tokenizer = load_tokenizer(owner.path)
        limit, size = self.wanted.limit, self.wanted.batch_size
        return score(one.model, tokenizer, self.tasks, limit=limit, batch_size=size, kept=kept, progress=step)

    def _kept(self, models: list[_Loaded], facts: list[Any]) -> Kept:
        """The file for these models and facts; memory alone where a model is not known by its digest."""
        digests = [m.facts.sha256 if m.facts else None for m in models]
        if None in digests:
            return Kept()
        kept = Kept(*work_file(digests, facts, versions(), machine(self.wanted.device)))
        self.files.append(kept)
        return kept


def protocol_text(text: Text, max_windows: int | None) -> tuple[Text, int | None]:
    """The text as the papers read it, and how many windows: C4 of the Hub as GPTQ's code does, any other as it is."""
    if not text.name.startswith("c4 ("):
        return text, max_windows
    joined = Text.of(f"{text.name}, first {C4_DOCUMENTS:,} documents", [" ".join(text.documents[:C4_DOCUMENTS])])
    return joined, min(max_windows or C4_WINDOWS, C4_WINDOWS)


def _tasks(wanted: Wanted) -> dict[str, Any]:
    if not wanted.tasks:
        return {}
    if wanted.limit is not None and wanted.limit < 1:
        raise RecipeError(f"the limit is {wanted.limit} samples: at least one is needed")
    try:
        from lplr.evaluate.zero_shot import load_tasks
    except ModuleNotFoundError as error:
        raise RecipeError(f"tasks need the package {error.name}: pip install 'lplr[eval]'") from None
    return load_tasks(wanted.tasks, wanted.task_data)


def _load(path: Path, wanted: Wanted) -> _Loaded:
    where: torch.device = usable_device(wanted.device)
    model: nn.Module = nn.Module.to(load_model(path), where)
    return _Loaded(model, path, model_facts(path, model))


def _calibration(path: Path) -> dict[str, Any] | None:
    """The calibration set that a compressed folder names."""
    if not (path / LEDGER).is_file():
        return None
    return records.read(path / LEDGER)[0].get("calibration")
