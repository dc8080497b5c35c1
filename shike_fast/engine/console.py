"""What a run shows: a live progress bar on a terminal, plain lines elsewhere, a table at the end."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table

from shike_fast.data.shots import SHOTS

_ACCURACIES = {"top1": "top-1", **{shot: shot for shot in SHOTS}}
_LINE_EVERY = 60.0  # seconds between lines within an epoch where there is no terminal


class _Output(RichConsole):
    """Standard output; a run continues silently when its reader has gone (``... | head``)."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor may the flush at exit fail


class RunConsole:
    """Progress of one run.

    Args:
        epochs: epochs of the whole run.
        batches: batches of one epoch.
        console: where to print; default standard output.
        quiet: print nothing.
    """

    def __init__(self, epochs: int, batches: int, console: RichConsole | None = None, *, quiet: bool = False) -> None:
        self.console = console or _Output(highlight=False, soft_wrap=True, quiet=quiet)
        self._epochs = epochs
        self._batches = batches
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._label = ""
        self._epoch = 0
        self._last_line = time.monotonic()
        self._seconds_per_batch: float | None = None

    def note(self, text: str) -> None:
        """Print one line; above the bar if there is one."""
        self.console.print(text, markup=False)

    def start_epoch(self, epoch: int, stage: int, done: int) -> None:
        """Show the 0-based ``epoch`` of ``stage``, of which ``done`` batches have been trained."""
        self._epoch = epoch
        self._label = f"epoch {epoch + 1}/{self._epochs} stage {stage}"
        if not self.console.is_terminal:
            return
        if self._progress is None:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total}"),
                TextColumn("{task.fields[status]}"),
            )
            self._progress = Progress(*columns, console=self.console, transient=True)
            self._progress.start()
            self._task = self._progress.add_task(self._label, total=self._batches, status="")
        if self._task is not None:
            self._progress.reset(self._task, description=self._label, completed=done, status="")

    def step(self, done: int, loss: float, accuracy: float, images_per_second: float, seconds_per_batch: float) -> None:
        """Show the epoch so far: mean loss, training accuracy in percent, speed, and the time left for the run."""
        self._seconds_per_batch = seconds_per_batch
        status = f"loss {loss:.4f}  acc {accuracy:.1f}%  {images_per_second:,.0f} images/s  left {self._left(done)}"
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done, status=status)
        elif time.monotonic() - self._last_line > _LINE_EVERY:
            self._last_line = time.monotonic()
            self.note(f"{self._label}  {done}/{self._batches}  {status}")

    def testing(self) -> None:
        """Show that the epoch is trained and being tested."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, status="testing")

    def end_epoch(self, row: dict[str, Any]) -> None:
        """Print the line of a finished epoch."""
        self._last_line = time.monotonic()
        shots = "/".join(_figure(row[shot]) for shot in SHOTS)
        self.note(
            f"{self._label}  loss {row['train_loss']:.4f}  train {row['train_top1']:.1f}%  top-1 {row['top1']:.2f}%  "
            f"many/medium/few {shots}  lr {row['lr']:.4g}  {row['images_per_second']:,.0f} images/s  "
            f"left {self._left(self._batches)}"
        )

    def table(
        self, title: str, rows: Sequence[tuple[str, Mapping[str, Any]]], columns: Mapping[str, str] = _ACCURACIES
    ) -> None:
        """Print figures side by side.

        Args:
            title: heading.
            rows: label and figures by name: numbers, texts, or None.
            columns: the names of those to print, each with its heading; default the accuracies in percent.
        """
        table = Table(title=title)
        table.add_column("")
        for heading in columns.values():
            table.add_column(heading, justify="right", no_wrap=True)
        for label, figures in rows:
            table.add_row(label, *(_figure(figures[name], digits=2) for name in columns))
        self.console.print(table)

    def close(self) -> None:
        """Take the bar down."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = self._task = None

    def _left(self, done: int) -> str:
        if self._seconds_per_batch is None:
            return "?"
        batches = self._batches - done + (self._epochs - self._epoch - 1) * self._batches
        minutes, seconds = divmod(round(batches * self._seconds_per_batch), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _figure(value: float | str | None, digits: int = 1) -> str:
    if isinstance(value, str):
        return value
    return "–" if value is None else f"{value:.{digits}f}"
