"""SIGTERM and Ctrl-C end a run at the next step instead of killing it."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any


class GracefulStop:
    """Context in which the first SIGTERM or SIGINT only sets :attr:`signal`; a second one acts as usual.

    A signal that is ignored stays so: a script starts its background jobs like this, and Ctrl-C is not meant for them.
    Outside the main thread, where Python allows no signal handlers, the context changes nothing.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self.signal is not None

    @property
    def number(self) -> int:
        """Number of the signal, 0 for none."""
        return int(self.signal or 0)

    def __enter__(self) -> GracefulStop:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        self._restore()  # a second signal ends the process at once

    def _restore(self) -> None:
        while self._previous:
            number, handler = self._previous.popitem()
            signal.signal(number, handler)


class Interrupted(Exception):
    """SIGTERM or Ctrl-C ended the run; what was done is saved.

    Attributes:
        exit_status: 128 plus the signal's number, as a shell reports it.
    """

    def __init__(self, number: int, saved: Path) -> None:
        super().__init__(
            f"stopped by {signal.Signals(number).name}; state saved in {saved}; "
            f"go on with --output-dir {saved.parent} --resume"
        )
        self.exit_status = 128 + number
