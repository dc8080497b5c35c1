"""How far a long work is, where there is no terminal and where there is one."""

import io

import pytest
from rich.console import Console

from shike_fast._util import progress


def test_a_line_a_minute_without_a_terminal(capsys, monkeypatch):
    clock = iter([0.0, 30.0, 61.0, 90.0, 130.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.progress("packing", 1000) as advance:
        for count in (100, 205, 300, 345):
            advance(count)
    assert capsys.readouterr().err == "packing: 305 of 1,000, 5/s\npacking: 950 of 1,000, 7/s\n"


def test_a_bar_on_a_terminal(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr("rich.console.Console", lambda stderr: Console(file=stream, force_terminal=True, width=120))
    with progress.progress("checking", 3) as advance:
        advance(1)
        advance(2)
    assert "checking" in stream.getvalue() and "3/3" in stream.getvalue()


@pytest.mark.parametrize("total", [12_000_000, None])
def test_bytes_end_with_a_line(capsys, monkeypatch, total):
    clock = iter([0.0, 1.0, 4.0, 4.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.progress("x.tar", total, in_bytes=True) as advance:
        advance(2_000_000)
        advance(10_000_000)
    of = " of 12.0 MB" if total else ""
    assert capsys.readouterr().err == f"x.tar: 12.0 MB{of}, 3.0 MB/s\n"


def test_a_bar_without_a_total(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr("rich.console.Console", lambda stderr: Console(file=stream, force_terminal=True, width=120))
    with progress.progress("x.tar", None, in_bytes=True) as advance:
        advance(2_000_000)
    assert "2.0 MB" in stream.getvalue()
