import io
import sys
import time

import pytest
from programs import LIMIT
from rich.console import Console

from shike_fast.engine import console as console_module
from shike_fast.engine.console import RunConsole

ROW = {
    "train_loss": 1.2345,
    "train_top1": 60.0,
    "top1": 56.789,
    "many": 73.0,
    "medium": 50.0,
    "few": None,
    "lr": 0.1,
    "images_per_second": 1234.5,
}


def make(terminal: bool) -> tuple[RunConsole, io.StringIO]:
    output = io.StringIO()
    return RunConsole(3, 10, Console(file=output, force_terminal=terminal, width=140, soft_wrap=True)), output


def test_plain_lines_without_a_terminal():
    console, output = make(terminal=False)
    console.start_epoch(0, 1, 0)
    console.step(10, 1.2345, 60.0, 1234.5, 2.0)
    console.testing()
    console.end_epoch(ROW)
    console.close()
    assert output.getvalue() == (
        "epoch 1/3 stage 1  loss 1.2345  train 60.0%  top-1 56.79%  many/medium/few 73.0/50.0/–  lr 0.1  "
        "1,234 images/s  left 0:40\n"
    )


def test_a_long_epoch_shows_that_it_lives(monkeypatch):
    monkeypatch.setattr(console_module, "_LINE_EVERY", 0.0)
    console, output = make(terminal=False)
    console.start_epoch(1, 2, 0)
    console.step(5, 3.0, 12.5, 100.0, 900.0)
    assert output.getvalue() == ("epoch 2/3 stage 2  5/10  loss 3.0000  acc 12.5%  100 images/s  left 3:45:00\n")


def wait_for(text, output):
    """The bar is drawn ten times a second, if the machine has the time."""
    end = time.monotonic() + LIMIT
    while text not in output.getvalue():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_bar_on_a_terminal():
    console, output = make(terminal=True)
    console.start_epoch(0, 1, 0)
    console.step(7, 1.5, 42.0, 999.0, 1.0)
    wait_for("7/10", output)
    console.note("above the bar")
    console.testing()
    wait_for("testing", output)
    console.start_epoch(1, 1, 3)
    console.close()
    shown = output.getvalue()
    for text in ("epoch 1/3 stage 1", "━", "7/10", "loss 1.5000", "acc 42.0%", "999 images/s", "left 0:23", "testing"):
        assert text in shown
    assert "above the bar" in shown
    assert "epoch 2/3 stage 1" in shown
    assert "3/10" in shown
    console.close()  # a second time does no harm


def test_time_left_is_unknown_before_the_first_step():
    console, output = make(terminal=False)
    console.start_epoch(0, 1, 10)
    console.end_epoch(ROW)
    assert output.getvalue().endswith("left ?\n")


def test_a_reader_that_goes_away_does_not_end_the_run(programs):
    script = (
        "import sys\n"
        "from shike_fast.engine.console import RunConsole\n"
        "console = RunConsole(1, 1)\n"
        "for line in range(100_000): console.note('a line of the run')\n"
        "print('finished', file=sys.stderr)"
    )
    process = programs.start([sys.executable, "-c", script])
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == "finished\n"
    assert process.wait() == 0


@pytest.mark.parametrize("terminal", [False, True])
def test_table(terminal):
    console, output = make(terminal)
    console.table("title", [("stage 1", ROW)])
    for text in ("title", "top-1", "many", "medium", "few", "stage 1", "56.79", "73.00", "–"):
        assert text in output.getvalue()
