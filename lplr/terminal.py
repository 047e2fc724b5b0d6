"""What the command says and how: tables go to stdout; progress, notes and errors to stderr.

Where stderr is no terminal, progress is a plain line now and then.
"""

from __future__ import annotations

import errno
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lplr.errors import LplrError

out = Console(width=None if sys.stdout.isatty() else 140)
err = Console(stderr=True, width=None if sys.stderr.isatty() else 140)
PLAIN_SECONDS = 20.0  # between two lines of progress where there is no terminal to draw a bar on
Step = Callable[[float, float, str], None]  # (done, total, what)


@contextmanager
def clear_errors() -> Iterator[None]:
    """Every error that the user can mend is one line on stderr and status 2."""
    try:
        yield
    except KeyboardInterrupt:
        err.print("stopped; run the same command again to go on", soft_wrap=True)
        raise typer.Exit(130) from None
    except LplrError as error:
        message = str(error)
    except OSError as error:
        if error.errno == errno.EPIPE:  # the reader of our output has gone: not an error
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "make room on the disk, then run the same command again" if full else "check the path and its permissions"
        message = f"{error}: {remedy}"
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(s in str(error) for s in ("allocate memory", "out of memory")):
            raise
        message = "out of memory: `lplr compress --dry-run` tells what is needed; a smaller --seqlen needs less"
    else:
        return
    fail(message)
    raise typer.Exit(2)


def fail(message: str) -> None:
    """The one line of an error."""
    err.print(f"[bold red]error:[/] {escape(' '.join(message.split()))}", soft_wrap=True)


@contextmanager
def progress_bar(what: str) -> Iterator[Step]:
    """Yields step(done, total, text): a bar with elapsed and remaining time on stderr, or a line now and then in a log."""
    if not err.is_terminal:
        yield _plain_lines(what)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task(what, total=None)

        def step(done: float, total: float, text: str) -> None:
            bar.update(task, completed=done, total=total, description=escape(f"{what}: {text}"))

        yield step


def _plain_lines(what: str) -> Step:
    """Progress as plain lines, at most one in PLAIN_SECONDS."""
    started = told = time.monotonic()

    def step(done: float, total: float, text: str) -> None:
        nonlocal told
        now = time.monotonic()
        if now - told < PLAIN_SECONDS:
            return
        told = now
        left = f", {duration_text((now - started) * (total - done) / done)} left" if done else ""
        err.print(f"{what}: {escape(text)} ({done / total if total else 0:.0%}{left})", soft_wrap=True)

    return step


def notice(message: str) -> None:
    """A line that is no error."""
    err.print(f"[yellow]note:[/] {escape(' '.join(message.split()))}", soft_wrap=True)


def size_text(count: float) -> str:
    """Bytes in units of 1024."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"


def duration_text(seconds: float) -> str:
    """Seconds in words, two units at most."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
