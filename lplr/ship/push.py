"""`lplr push`: a compressed folder, checked, with its report and a card that says what was measured, goes to the Hub."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lplr import records
from lplr.errors import HubError
from lplr.hf.card import CARD, SHIM, base_licence, card_text
from lplr.hf.push import create, upload
from lplr.records import LEDGER
from lplr.report.page import REPORT, write_report
from lplr.stream.verify import verify

Notify = Callable[[str], None]
Step = Callable[[float, float, str], None]


def push(
    folder: Path | str,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    notify: Notify | None = None,
    progress: Step | None = None,
) -> str:
    """Publish a folder that `compress` wrote as the Hub's repository `repo` (owner/name); the address of the commit.

    Sent are the files of the run, run.jsonl, evaluations, report.html (made when it is missing) and the card; `folder` itself
    gets the report and is left as it is otherwise.  The same call after an interruption goes on.  private: of a repository that
    is made now.  revision: a branch, made when it is missing.  Raises VerificationError for a folder that is not intact,
    HubError.
    """
    path, tell = Path(folder).expanduser(), notify or (lambda _: None)
    verify(path, progress=progress)
    create(repo, private=private, revision=revision)
    report = path / REPORT if (path / REPORT).is_file() else write_report(path)
    entries = records.read(path / LEDGER)
    done = entries[-1]
    evaluations = {file: _evaluation(file) for file in sorted(path.glob("eval-*.json"))}
    recipe = entries[0]["recipe"]
    licence = _licence(recipe, tell)
    if any(Path(str(recipe.get(field))).is_absolute() for field in ("model", "dataset")):
        tell("run.jsonl and recipe.yaml name paths of this machine, and are published as they are")
    rows = list(records.layers(entries))
    card = card_text(entries[0], done, rows, evaluations=list(evaluations.values()), licence=licence, repo=repo)
    if SHIM not in done["files"]:
        tell(f"the folder is older than {SHIM}: without `import lplr` its weights will be random: compress it again")
    with tempfile.TemporaryDirectory() as scratch:
        staged = Path(scratch)
        for file in {*(path / name for name in done["files"] if name != CARD), path / LEDGER, report, *evaluations}:
            _link(file, staged / file.name)
        (staged / CARD).write_text(card, encoding="utf-8")
        if progress:
            progress(0.0, 1.0, f"sending {sum(f.stat().st_size for f in staged.iterdir()):,} bytes to {repo}")
        return upload(staged, repo, revision=revision, message=f"{done['bits_per_weight']:.2f} bits per weight, by lplr")


def _evaluation(file: Path) -> dict[str, Any]:
    """What `lplr eval` kept; {} of a file that is damaged, which goes on the Hub but not into the card."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _licence(recipe: dict[str, Any], tell: Notify) -> dict[str, str]:
    try:
        found = base_licence(recipe["model"], recipe.get("revision"))
    except HubError as error:
        tell(f"the licence of the base model is not known ({error})")
        return {}
    if not found:
        tell("the base model names no licence: add `license:` to the card on the Hub")
    return found


def _link(source: Path, target: Path) -> None:
    """The file under another name, without copying it where the system can."""
    try:
        target.symlink_to(source.resolve())
    except OSError:  # a file system without links
        shutil.copyfile(source, target)
