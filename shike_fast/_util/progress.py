"""How far a long work is, on standard error: a bar on a terminal, a line a minute elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_LINE_EVERY = 60.0  # seconds


@contextlib.contextmanager
def progress(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show how far the work is; yields a function that is told how many more items are done."""
    console = Console(stderr=True)
    shown = _bar(description, total, console) if console.is_terminal else _lines(description, total)
    with shown as advance:
        yield advance


@contextlib.contextmanager
def _bar(description: str, total: int, console: Console) -> Iterator[Callable[[int], None]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(description, total=total, rate="")

        def advance(count: int) -> None:
            speed = bar.tasks[task].finished_speed or bar.tasks[task].speed
            bar.update(task, advance=count, rate=f"{speed:,.0f}/s" if speed else "")

        yield advance


@contextlib.contextmanager
def _lines(description: str, total: int) -> Iterator[Callable[[int], None]]:
    done = 0
    started = told = time.monotonic()

    def advance(count: int) -> None:
        nonlocal done, told
        done += count
        now = time.monotonic()
        if now - told >= _LINE_EVERY:
            told = now
            speed = done / (now - started)
            print(f"{description}: {done:,} of {total:,}, {speed:,.0f}/s", file=sys.stderr, flush=True)

    yield advance
