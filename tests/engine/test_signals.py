import signal
import subprocess
import sys
import threading

import pytest

from shike_fast._util.cli import run_command
from shike_fast.engine.signals import GracefulStop


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_first_signal_only_asks(number):
    before = signal.getsignal(number)
    with GracefulStop() as stop:
        assert not stop.requested
        assert stop.number == 0
        signal.raise_signal(number)
        assert stop.requested
        assert stop.number == int(number)
    assert signal.getsignal(number) is before


@pytest.fixture(params=[signal.SIGTERM, signal.SIGINT])
def ignored(request):
    """A signal that the caller of the command wants to be ignored."""
    before = signal.signal(request.param, signal.SIG_IGN)
    yield request.param
    signal.signal(request.param, before)


def test_an_ignored_signal_stays_ignored(ignored):
    def command():
        with GracefulStop() as stop:
            signal.raise_signal(ignored)
            return int(stop.requested)

    assert run_command(command) == 0
    assert run_command(lambda: signal.raise_signal(ignored) or 0) == 0
    assert signal.getsignal(ignored) is signal.SIG_IGN


def test_a_background_job_of_a_script_stops_at_sigterm_only(runs, programs, tmp_path):
    """Such a job ignores Ctrl-C from its start on."""
    command = [sys.executable, "-m", "shike_fast.train", *runs.small, "--epochs", 500, "--output-dir", tmp_path / "run"]
    shell = ["sh", "-c", "trap '' INT; exec \"$@\"", "sh"]
    process = programs.start([*shell, *command], stdout=subprocess.DEVNULL)
    programs.wait_until(lambda: runs.epochs(tmp_path / "run"), process)
    process.send_signal(signal.SIGINT)
    epochs = runs.epochs(tmp_path / "run")
    programs.wait_until(lambda: runs.epochs(tmp_path / "run") > epochs + 1, process)
    process.send_signal(signal.SIGTERM)
    done = programs.finish(process)
    assert done.returncode == 128 + signal.SIGTERM
    assert done.stderr.startswith("stopped by SIGTERM; state saved in")


def test_second_ctrl_c_interrupts_at_once():
    with pytest.raises(KeyboardInterrupt), GracefulStop():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


def test_handlers_are_put_back_after_an_error():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError), GracefulStop():
        raise RuntimeError
    assert signal.getsignal(signal.SIGTERM) is before


def test_outside_the_main_thread_nothing_changes():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def enter():
        with GracefulStop() as stop:
            seen.append((stop.requested, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [(False, before)]
