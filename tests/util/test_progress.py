"""How far a long work is, where there is no terminal and where there is one."""

import io

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
    monkeypatch.setattr(progress, "Console", lambda stderr: Console(file=stream, force_terminal=True, width=120))
    with progress.progress("checking", 3) as advance:
        advance(1)
        advance(2)
    assert "checking" in stream.getvalue() and "3/3" in stream.getvalue()
