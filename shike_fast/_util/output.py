"""Standard output and error while a command runs: nothing that is printed ends it.

Characters that the encoding lacks are printed as plain letters or as escapes. What nobody can read any more, because
the stream was closed or its reader has gone (``... | head``), is dropped.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import select
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TextIO

_PLAIN = {"–": "-", "−": "-", "…": "...", "·": ".", "×": "x"}
_ERRORS = "shike_fast.plain"


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    characters = error.object[error.start : error.end]
    return "".join(_PLAIN.get(c) or c.encode("ascii", "backslashreplace").decode() for c in characters), error.end


codecs.register_error(_ERRORS, _plain)


class _Descriptor(io.FileIO):
    """An open file descriptor that takes all that is written, and drops it once a write has failed."""

    def __init__(self, number: int) -> None:
        super().__init__(number, "wb", closefd=False)
        self.failure: OSError | None = None

    def write(self, data: Any, /) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        while len(rest) and self.failure is None:
            try:
                written = os.write(self.fileno(), rest)
            except BlockingIOError:  # a terminal or a pipe that another program has left in this state
                select.select([], [self], [])
                continue
            except OSError as error:
                self.failure = error
                break
            rest = rest[written:]
        return size


@dataclass(frozen=True)
class Output:
    """What became of standard output."""

    _descriptor: _Descriptor | None

    @property
    def failure(self) -> OSError | None:
        """Why some of it was lost, though somebody still wanted to read it."""
        failure = self._descriptor.failure if self._descriptor is not None else None
        return None if isinstance(failure, BrokenPipeError) else failure


@contextlib.contextmanager
def forgiving_streams() -> Iterator[Output]:
    """Replace ``sys.stdout`` and ``sys.stderr`` meanwhile by streams that print what can be printed.

    Streams that are no files of the system, such as a notebook's, stay as they are.
    """
    _open_standard_descriptors()
    before = sys.stdout, sys.stderr
    out, out_descriptor = _forgiving(sys.stdout, 1)
    err, _ = _forgiving(sys.stderr, 2)
    sys.stdout, sys.stderr = out, err
    try:
        yield Output(out_descriptor)
    finally:
        out.flush()
        err.flush()
        sys.stdout, sys.stderr = before


def _open_standard_descriptors() -> None:
    """Give numbers that were closed (``>&-``) to the null device, or the next file that is opened would get them."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def _forgiving(stream: TextIO | None, number: int) -> tuple[TextIO, _Descriptor | None]:
    if stream is None:  # closed when the interpreter started
        descriptor = _Descriptor(number)
        return io.TextIOWrapper(io.BufferedWriter(descriptor), "utf-8", _ERRORS, line_buffering=True), descriptor
    raw = getattr(getattr(stream, "buffer", None), "raw", getattr(stream, "buffer", None))
    if not isinstance(stream, io.TextIOWrapper) or not isinstance(raw, io.FileIO):
        return stream, None
    with contextlib.suppress(OSError):  # what the caller could not print is the caller's to lose
        stream.flush()
    descriptor = _Descriptor(stream.fileno())
    buffered = raw is not stream.buffer
    text = io.TextIOWrapper(
        io.BufferedWriter(descriptor) if buffered else descriptor,
        stream.encoding,
        _ERRORS,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
    return text, descriptor
