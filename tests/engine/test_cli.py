import os
import signal
import threading

import pytest
import torch

from shike_fast.engine.cli import ArgumentParser, choose_device, make_deterministic, run_command
from shike_fast.engine.trainer import NonFiniteLossError, make_autocast
from shike_fast.errors import ConfigError, DataError


def raising(error):
    def command():
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (DataError("file x is truncated"), 2, "error: file x is truncated\n"),
        (NonFiniteLossError("the loss is not finite"), 1, "error: the loss is not finite\n"),
        (FileNotFoundError(2, "No such file", "weights.pt"), 1, "error: cannot use file weights.pt: No such file\n"),
        (
            RuntimeError("DataLoader worker (pid 7) is killed"),
            1,
            "error: DataLoader worker (pid 7) is killed; memory may",
        ),
        (KeyboardInterrupt(), 130, "error: stopped by SIGINT\n"),
        (MemoryError(), 1, "error: out of memory (no details); lower --batch-size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate"), 1, "error: out of memory (DefaultCPUAllocator: can't"),
        (OSError("no space"), 1, "error: cannot use file: no space\n"),
        (torch.OutOfMemoryError("CUDA out\nof memory"), 1, "error: out of memory (CUDA out of memory); lower"),
    ],
)
def test_errors_become_one_line(error, status, line, capsys):
    assert run_command(raising(error)) == status
    printed = capsys.readouterr().err
    assert printed.startswith(line)
    assert printed.count("\n") == 1


def test_faults_of_the_library_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run_command(raising(ZeroDivisionError()))
    with pytest.raises(RuntimeError, match="a fault"):
        run_command(raising(RuntimeError("a fault")))


def test_sigterm_where_there_is_nothing_to_save(capsys):
    before = signal.getsignal(signal.SIGTERM)
    assert run_command(lambda: os.kill(os.getpid(), signal.SIGTERM)) == 143
    assert capsys.readouterr().err == "error: stopped by SIGTERM\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_outside_the_main_thread_a_command_runs_without_handlers():
    results = []
    thread = threading.Thread(target=lambda: results.append(run_command(lambda: 0)))
    thread.start()
    thread.join()
    assert results == [0]


def test_options_are_not_abbreviated(capsys):
    parser = ArgumentParser(prog="tool")
    parser.add_argument("--epochs", type=int)
    with pytest.raises(SystemExit):
        parser.parse_args(["--ep", "3"])
    assert "unrecognized arguments: --ep 3" in capsys.readouterr().err


def test_status_is_passed_on():
    assert run_command(lambda: 143) == 143


def test_parser_errors_are_one_line(capsys):
    parser = ArgumentParser(prog="tool")
    parser.add_argument("--epochs", type=int)
    with pytest.raises(SystemExit) as exit_:
        parser.parse_args(["--epochs", "many"])
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "error: argument --epochs: invalid int value: 'many'; see tool --help\n"


def test_devices():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpu", "--device: 'gpu' is no device; use cpu, cuda or cuda:N"),
        ("meta", "--device: 'meta' is not supported"),
        ("cuda:99", "--device: 'cuda:99' is not on this machine, which has .* CUDA devices; use --device cpu"),
    ],
)
def test_bad_devices(name, message):
    with pytest.raises(ConfigError, match=message):
        choose_device(name)


def test_deterministic_mode(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        make_deterministic(True)
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.benchmark
    finally:
        make_deterministic(False)
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.benchmark


@pytest.mark.parametrize(("amp", "dtype"), [("off", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_autocast(amp, dtype):
    with make_autocast(amp, torch.device("cpu"))():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
