"""How far a long work is, on standard error: a bar on a terminal, a line a minute elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_LINE_EVERY = 60.0  # seconds


@contextlib.contextmanager
def progress(description: str, total: int | None, *, in_bytes: bool = False) -> Iterator[Callable[[int], None]]:
    """Show how far the work is; yields a function to call with the number of items done since its last call.

    Args:
        description: what is shown before the numbers.
        total: number of items; None if it is not known.
        in_bytes: the items are bytes, shown as MB; where there is no terminal, a line at the end says how many.
    """
    from rich.console import Console  # takes a tenth of a second to import: only when there is something to show

    console = Console(stderr=True)
    amount = _megabytes if in_bytes else _number
    shown = _bar if console.is_terminal else _lines
    with shown(description, total, amount, console) as advance:
        yield advance


def _number(count: float) -> str:
    return f"{count:,.0f}"


def _megabytes(count: float) -> str:
    return f"{count / 1e6:,.1f} MB"


@contextlib.contextmanager
def _bar(
    description: str, total: int | None, amount: Callable[[float], str], console: Console
) -> Iterator[Callable[[int], None]]:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[done]}"),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    of = "" if total is None else f"/{amount(total)}"
    done = 0
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(description, total=total, done=amount(0) + of, rate="")

        def advance(count: int) -> None:
            nonlocal done
            done += count
            speed = bar.tasks[task].finished_speed or bar.tasks[task].speed
            bar.update(task, completed=done, done=amount(done) + of, rate=f"{amount(speed)}/s" if speed else "")

        yield advance


@contextlib.contextmanager
def _lines(
    description: str, total: int | None, amount: Callable[[float], str], console: Console
) -> Iterator[Callable[[int], None]]:
    of = "" if total is None else f" of {amount(total)}"
    done = 0
    started = shown = time.monotonic()

    def line(now: float) -> None:
        print(f"{description}: {amount(done)}{of}, {amount(done / (now - started))}/s", file=sys.stderr, flush=True)

    def advance(count: int) -> None:
        nonlocal done, shown
        done += count
        now = time.monotonic()
        if now - shown >= _LINE_EVERY:
            shown = now
            line(now)

    yield advance
    if amount is _megabytes:
        line(time.monotonic())
