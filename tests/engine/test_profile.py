"""``--profile``."""

import json
import re

import pytest

from shike_fast.engine.profile import ACTIVE, SKIPPED, TRACE, WARM_UP


def test_a_trace_and_ten_operators(runs, tmp_path, capsys):
    assert runs.train(*runs.small, "--profile", "--output-dir", tmp_path / "run") == 0
    printed = capsys.readouterr().out
    events = json.loads((tmp_path / "run" / TRACE).read_text())["traceEvents"]
    assert sum("convolution_backward" in str(event.get("name")) for event in events) >= ACTIVE
    table = printed.split(f"the most expensive operators of {ACTIVE} steps and the test between them:\n")[1].split(
        "trace of them"
    )[0]
    rows = [
        re.fullmatch(r" +([\d.]+) ms +[\d.]+ % +\d+ x  (.+)", line) for line in table.splitlines() if " ms " in line
    ]
    assert len(rows) == 10 and all(rows)
    assert [float(row[1]) for row in rows] == sorted((float(row[1]) for row in rows), reverse=True)
    assert "aten::convolution_backward" in {row[2] for row in rows}
    assert f"{TRACE}; open it in ui.perfetto.dev" in printed


@pytest.mark.parametrize("epochs", [1, 2])
def test_too_short_a_run_says_so(runs, tmp_path, capsys, epochs):
    """It ends before the profile has begun, or within it."""
    assert runs.train(*runs.small, "--epochs", epochs, "--profile", "--output-dir", tmp_path / "run") == 0
    printed = capsys.readouterr().out
    assert f"no profile: this needs {SKIPPED + WARM_UP + ACTIVE} steps, the run had {6 * epochs}" in printed
    assert "most expensive" not in printed
    assert not (tmp_path / "run" / TRACE).exists()
