"""The suite itself: whatever hangs is named and ended, with all that it started; the caller's surroundings stay out."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from programs import Programs, marked

SUPPORT = Path(__file__).parent / "support"

# Only what hangs gets no time, so that nothing here depends on the speed of the machine.
CONFTEST = f"""
import sys
sys.path.insert(0, {str(SUPPORT)!r})
import limits

limits.HEAD_START = 0.2

class Limits(limits.Limits):
    def begin(self, name, limit):
        super().begin(name, 0 if name == {{hangs!r}} else 1000)

def pytest_configure(config):
    config.pluginmanager.register(Limits(1000, "/none:"))
"""

IN_C = """
import ctypes
def test_hangs():
    ctypes.PyDLL(None).sleep(1000)  # holds the lock that Python needs to run a handler
"""
AT_COLLECTION = """
import time
time.sleep(1000)
"""
AFTER_A_FAILURE = """
import time, pytest
@pytest.fixture
def slow_to_end():
    yield
    time.sleep(1000)
def test_hangs(slow_to_end):
    assert False
"""


@pytest.mark.parametrize(
    ("code", "hangs"),
    [
        (IN_C, "test_it.py::test_hangs"),
        (AT_COLLECTION, "collecting test_it.py"),
        (AFTER_A_FAILURE, "test_it.py::test_hangs"),
    ],
    ids=["in C", "at collection", "after a failure"],
)
def test_what_pytest_cannot_end_ends_the_session(programs, tmp_path, code, hangs):
    (tmp_path / "conftest.py").write_text(CONFTEST.format(hangs=hangs))
    (tmp_path / "test_it.py").write_text(code)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "test_it.py"]
    done = programs.run(command, cwd=tmp_path)
    assert done.returncode < 0
    assert f"\n{hangs}: no end after 0.2 s; this ends the session\n" in done.stderr
    assert 'test_it.py", line ' in done.stderr  # where it is


@pytest.fixture
def others():
    """Programs of their own: with one that has started another one in a session of its own."""
    programs = Programs()
    programs.mark = f"/{os.getpid()}, others:"
    yield programs
    programs.end()


STARTS_ANOTHER = ["sh", "-c", "setsid sleep 1000 & echo started; $0"]


def test_nothing_outlives_a_program_that_hangs(others):
    process = others.start([*STARTS_ANOTHER, "cat"], stdin=subprocess.PIPE)
    assert process.stdout.readline() == "started\n"
    with pytest.raises(AssertionError, match=r"^no end after 0\.1 s: sh -c 'setsid sleep 1000"):
        others.finish(process, limit=0.1)
    assert not list(marked(others.mark))


def test_nothing_outlives_its_test(others):
    process = others.start([*STARTS_ANOTHER, "true"])
    assert process.stdout.readline() == "started\n"
    process.wait()
    assert list(marked(others.mark))
    others.end()
    assert not list(marked(others.mark))


SURROUNDINGS = {
    **{"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONWARNINGS": "default"},
    **{"TERM": "dumb", "COLUMNS": "37", "FORCE_COLOR": "1", "RANK": "1", "WORLD_SIZE": "4"},
}
SENSITIVE = [
    "data/pack/test_processes.py::test_a_signal_ends_all_processes",
    "data/loaders/test_loader.py::test_a_program_ends_that_does_not_close_its_loader",
    "engine/test_signals.py::test_first_signal_only_asks",
    "test_readme.py::test_the_two_commands_stand_alone_on_their_lines",
]


@pytest.mark.slow
def test_the_callers_surroundings_stay_out(programs, pytestconfig):
    """As a background job of a script, which ignores signals, in a C locale, below some launcher."""
    shell = ["sh", "-c", "trap '' INT TERM CHLD; exec \"$@\"", "sh"]
    tests = [f"tests/{name}" for name in SENSITIVE]
    command = [*shell, sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "-q", *tests]
    done = programs.run(command, cwd=pytestconfig.rootpath, env=os.environ | SURROUNDINGS)
    assert done.returncode == 0 and "6 passed" in done.stdout, done.stdout + done.stderr
