import ctypes
import errno
import os
import signal
import sys
import threading

import pytest
import torch

from shike_fast._util.cli import (
    ArgumentParser,
    choose_device,
    keep_memory,
    make_deterministic,
    run_command,
    use_device,
)
from shike_fast.engine.precision import make_autocast
from shike_fast.engine.trainer import NonFiniteLossError
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
        (RuntimeError("can't start new thread"), 1, "error: cannot go on (can't start new thread); raise the limit of"),
        (KeyboardInterrupt(), 130, "error: stopped by SIGINT\n"),
        (
            MemoryError(),
            1,
            "error: out of memory (no details); lower --batch-size, raise --accumulate or use --amp bf16",
        ),
        (RuntimeError("DefaultCPUAllocator: can't allocate"), 1, "error: out of memory (DefaultCPUAllocator: can't"),
        (OSError("no space"), 1, "error: the system refuses a call: no space\n"),
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


def test_a_numbered_gpu_becomes_the_current_one(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for name in ("cpu", "cuda", "cuda:1"):
        use_device(torch.device(name))
    assert chosen == [torch.device("cuda", 1)]


FAULTS = """
import ctypes
import resource
import sys
import torch
from shike_fast._util.cli import keep_memory

def step():
    tensors = [torch.ones(2**21 + 2**12 * k) for k in range(8)]  # 8 MiB each, as the maps of a step

PR_SET_THP_DISABLE = 41  # one fault for 2 MiB is few enough without keeping anything
ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
if sys.argv[1] == "kept":
    assert keep_memory()
for _ in range(3):
    step()
faults = []
for _ in range(11):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(sorted(faults)[5])  # a system that takes pages back does so at times
"""


def test_memory_is_kept_from_step_to_step(programs):
    pages = 8 * 2**23 // os.sysconf("SC_PAGESIZE")
    faults = {}
    for name in ("given back", "kept"):
        command = [sys.executable, "-c", FAULTS, name]
        # Left alone, glibc moves its threshold as blocks are freed, and may then keep the memory for once by chance.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}
        done = programs.run(command, env=environment)
        assert done.returncode == 0, done.stderr
        faults[name] = int(done.stdout)
    assert faults["kept"] < pages / 100
    assert faults["given back"] > pages / 2


def test_a_c_library_that_cannot_keep_memory(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    assert keep_memory() is False


def test_a_full_disk_is_named_with_its_remedy(capsys):
    def write():
        raise OSError(errno.ENOSPC, "No space left on device", "x.csv")

    assert run_command(write) == 1
    assert capsys.readouterr().err == (
        "error: the disk is full, there is no space left for x.csv; free some and repeat the command\n"
    )


def test_a_reader_that_goes_away_does_not_end_a_command(programs):
    program = "import sys; from shike_fast._util.cli import run_command; "
    program += "sys.exit(run_command(lambda: [print(i) for i in range(10**6)] and 0))"
    line = '"$0" -c "$1" | head -n 1; echo ${PIPESTATUS[0]}'
    done = programs.run(["bash", "-c", line, sys.executable, program])
    assert (done.stdout, done.stderr) == ("0\n0\n", "")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            OSError(errno.EDQUOT, "Disk quota exceeded", "x.csv"),
            "by the disk quota there is no space left for x.csv; ",
        ),
        (
            OSError(errno.EMFILE, "Too many open files", "a.jpg"),
            "too many open files for a.jpg; use fewer --workers",
        ),
        (OSError(errno.EIO, "Input/output error"), "the system refuses a call: Input/output error\n"),
    ],
)
def test_what_the_system_says_is_put_as_it_is(error, line, capsys):
    assert run_command(raising(error)) == 1
    assert capsys.readouterr().err.startswith(f"error: {line}")


def test_the_parser_ends_a_command_by_its_status(capsys):
    parser = ArgumentParser(prog="tool")
    assert run_command(lambda: parser.parse_args(["--what"])) == 2
    assert capsys.readouterr().err == "error: unrecognized arguments: --what; see tool --help\n"
    assert run_command(lambda: parser.parse_args(["--help"])) == 0
    assert capsys.readouterr().out.startswith("usage: tool")


def process_settings():
    return {
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "benchmark": torch.backends.cudnn.benchmark,
        "environment": dict(os.environ),
        "handlers": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "streams": (sys.stdout, sys.stderr),
        "random": torch.get_rng_state().tolist(),
    }


@pytest.mark.parametrize("fails", [False, True])
def test_the_caller_finds_its_process_as_it_was(monkeypatch, fails):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)

    def command():
        torch.set_num_threads(before["threads"] + 1)
        make_deterministic(not before["deterministic"])
        torch.manual_seed(3)
        if fails:
            raise DataError("no")
        return 0

    before = process_settings()
    assert run_command(command) == (2 if fails else 0)
    assert process_settings() == before


@pytest.mark.parametrize(
    ("rank", "world_size", "first"),
    [(None, None, True), ("1", None, True), ("0", "4", True), ("1", "4", False), ("5", "4", True), ("x", "4", True)],
)
def test_who_tells_a_bad_option(monkeypatch, capsys, rank, world_size, first):
    """A rank that a launcher left behind must not silence a command that runs alone."""
    monkeypatch.setattr("shike_fast._util.cli._HEAD_START", 0)
    for name, value in (("RANK", rank), ("WORLD_SIZE", world_size)):
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        ArgumentParser(prog="tool").parse_args(["--what"])
    assert bool(capsys.readouterr().err) == first
