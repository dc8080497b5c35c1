"""What is printed never ends a command, whatever standard output and error are."""

import io
import os
import subprocess
import sys
import threading

import pytest

from shike_fast._util.cli import run_command
from shike_fast._util.output import forgiving_streams


def printing(lines=1):
    def command():
        for _ in range(lines):
            print("few \u2013, and \u2026; \u00e4 \u4e2d \udce4")
        return 0

    return command


def stream(descriptor, encoding="utf-8", *, unbuffered=False):
    """Standard output as the interpreter makes it."""
    raw = io.FileIO(descriptor, "wb")
    return io.TextIOWrapper(raw if unbuffered else io.BufferedWriter(raw), encoding, write_through=unbuffered)


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("utf-8", "few –, and …; ä 中 \\udce4\n".encode()),
        ("latin-1", b"few -, and ...; \xe4 \\u4e2d \\udce4\n"),
        ("cp437", b"few -, and ...; \x84 \\u4e2d \\udce4\n"),
        ("ascii", b"few -, and ...; \\xe4 \\u4e2d \\udce4\n"),
    ],
)
@pytest.mark.parametrize("unbuffered", [False, True])
def test_characters_that_the_encoding_lacks(tmp_path, monkeypatch, encoding, expected, unbuffered):
    with stream(os.open(tmp_path / "out", os.O_WRONLY | os.O_CREAT), encoding, unbuffered=unbuffered) as out:
        out.write("before\n")
        monkeypatch.setattr(sys, "stdout", out)
        assert run_command(printing()) == 0
        assert sys.stdout is out
        out.write("after\n")
    assert (tmp_path / "out").read_bytes() == b"before\n" + expected + b"after\n"


@pytest.mark.parametrize("lines", [1, 10_000])
def test_a_reader_that_has_gone(monkeypatch, capsys, lines):
    reading, writing = os.pipe()
    os.close(reading)
    with stream(writing) as out:  # whose end flushes, as that of a process does
        monkeypatch.setattr(sys, "stdout", out)
        assert run_command(printing(lines)) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_below_the_output(monkeypatch, capsys):
    """A run goes on without its log; where the output is the result, its loss is a failure."""
    with stream(os.open("/dev/full", os.O_WRONLY)) as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert run_command(printing(), prints_result=False) == 0
        assert capsys.readouterr().err == ""
        assert run_command(printing()) == 1
    assert capsys.readouterr().err == (
        "error: standard output cannot be written: No space left on device; what was printed is not complete\n"
    )


def test_a_slow_reader_of_a_pipe_that_does_not_block(monkeypatch):
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    found = []

    def read():
        with open(reading, "rb") as file:
            found.append(file.read().count(b"\n"))

    thread = threading.Thread(target=read)
    with stream(writing) as out:
        monkeypatch.setattr(sys, "stdout", out)
        thread.start()
        assert run_command(printing(20_000)) == 0
    thread.join()
    assert found == [20_000]


def test_streams_that_are_no_files_stay(capsys):
    before = sys.stdout
    with forgiving_streams():
        assert sys.stdout is before
        print("–")
    assert capsys.readouterr().out == "–\n"


_CLOSED = """
import os, sys
from shike_fast.__main__ import main
from shike_fast._util.output import forgiving_streams
assert sys.stdout is None and sys.stderr is None
with forgiving_streams():
    number = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
    os.system("echo noise")
    print("nobody reads this")
sys.exit(number + main())
"""


def test_all_are_closed(tmp_path):
    """A file that is opened then must not get the number of standard output."""
    line = f'exec {sys.executable} -c "$0" {tmp_path}/file <&- >&- 2>&-'
    assert subprocess.run(["bash", "-c", line, _CLOSED]).returncode >= 3 + 2
    assert (tmp_path / "file").read_bytes() == b""


def test_help_where_the_encoding_lacks_characters_and_the_reader_goes(tmp_path):
    line = f"{sys.executable} -m shike_fast.train --help | head -n 1; echo ${{PIPESTATUS[0]}}"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=environment)
    usage, status = done.stdout.splitlines()
    assert usage.startswith("usage: python -m shike_fast.train") and (status, done.stderr) == ("0", "")
