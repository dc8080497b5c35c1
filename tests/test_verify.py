"""``python -m shike_fast.verify``, and what ``train`` says of the kernels it runs."""

import json
import os
import re
import sys

import pytest
import torch
from runs import Runs

from shike_fast import _full_verification, ops, verify
from shike_fast.ops import _verification
from shike_fast.ops._dispatch import OPERATORS
from shike_fast.ops._native import native
from shike_fast.ops._verdicts import FAILED, PASSED, Verdict


@pytest.fixture
def verdicts(monkeypatch):
    """What is known of the CPU, in place of trials."""
    known = {"cpu": dict.fromkeys(OPERATORS, Verdict(PASSED, "", {"float32 small": (1.0, 2.5)}))}
    monkeypatch.setitem(_verification._known, "cpu", known)
    monkeypatch.setattr(ops, "verify", lambda device, **_: known)
    return known


def test_text(verdicts, capsys):
    assert verify.main(["--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("cpu: ") and lines[-1].endswith("verdicts.json")
    assert "  cpu    dkt_loss              passed, 2.5 times the reference" in lines
    assert "  dkt_loss: cpu (verified on this CPU, 2.5 times the reference)" in lines


def test_a_failure_is_the_exit_status(verdicts, capsys):
    verdicts["cpu"]["dkf_pool"] = Verdict(FAILED, "float32 3x17x5x3: results that are not finite")
    assert verify.main([]) == 1
    output = capsys.readouterr().out
    assert "dkf_pool              failed: float32 3x17x5x3: results that are not finite\n" in output
    assert "dkf_pool: reference (cpu failed: float32 3x17x5x3: results that are not finite)\n" in output


def test_json(verdicts, capsys):
    assert verify.main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["file"].endswith("verdicts.json")
    (device,) = found["devices"]
    assert device["name"] == "cpu" and set(device["machine"]) == {"torch", "triton", "library", "sources", "device"}
    assert device["verdicts"]["cpu"]["dkt_loss"] == {
        "status": "passed",
        "reason": "",
        "times": {"float32 small": [1.0, 2.5]},
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seconds", "0"], "--seconds: must be positive, got 0"),
        (["--device", "gpu"], "--device: 'gpu' is no device"),
        (["--output-dir", "x"], "--output-dir: only with --full"),
        (["--full", "all"], "--full: no part is called 'all'; there are trials, timings, tests, sanitizer, triton"),
        (["--backend", "cpu"], "unrecognized arguments: --backend cpu"),
    ],
)
def test_bad_arguments(capsys, arguments, message):
    assert verify.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1


def test_full_without_a_gpu(verdicts, capsys, tmp_path):
    parts = ["tests", "sanitizer", "triton"]
    assert verify.main(["--device", "cpu", "--full", *parts, "--output-dir", str(tmp_path / "new")]) == 0
    assert [f"{name}: not tried: there is no GPU (0 s)" for name in parts] == capsys.readouterr().out.splitlines()[-3:]
    found = json.loads((tmp_path / "new" / "verification.json").read_text())
    assert [part["name"] for part in found["parts"]] == parts and set(found) == {"file", "devices", "parts"}


@pytest.mark.slow
def test_every_instruction_set(programs, tmp_path):
    command = [sys.executable, "-m", "shike_fast.verify", "--device", "cpu", "--full", "trials", "--seconds", 300]
    done = programs.run(command, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    tried = re.findall(r"^trials on (\w+): passed \(\d+ s\)$", done.stdout, re.MULTILINE)
    assert tried == native().cpu_levels()[1:]


@pytest.mark.slow
def test_times_beside_torch_compile(verdicts, capsys, tmp_path):
    for name in [name for name in verdicts["cpu"] if name != "dkt_loss"]:
        del verdicts["cpu"][name]
    assert verify.main(["--device", "cpu", "--full", "timings", "--output-dir", str(tmp_path), "--json"]) == 0
    (part,) = json.loads(capsys.readouterr().out)["parts"]
    assert (part["name"], part["status"]) == ("timings on cpu", "passed")
    assert [line["case"] for line in part["results"]] == ["float32 small", "float32 medium"]
    for line in part["results"]:
        assert set(line["milliseconds"]) == {"cpu", "reference", "torch.compile"}
        assert min(line["milliseconds"].values()) > 0


@pytest.mark.parametrize(
    ("found", "status", "reason"),
    [
        ("sys.exit(3)", "failed", "status 3: without a word"),
        ("os.kill(os.getpid(), 9)", "failed", "SIGKILL"),
        ("time.sleep(100)", "timed out", "no end within its time"),
    ],
)
def test_a_part_that_does_not_pass(monkeypatch, tmp_path, found, status, reason):
    """The device tests, in whose place a program runs."""
    monkeypatch.setattr(_full_verification, "SECONDS", 2.0 if status == "timed out" else 60.0)
    monkeypatch.setattr(_full_verification, "TESTS", ("-c", f"import os, sys, time; {found}"))
    (part,) = _full_verification.run_parts(["tests"], [torch.device("cuda")], tmp_path, 20)
    assert (part.name, part.status, part.reason) == ("tests", status, reason)
    assert part.text().startswith(f"tests: {status}: {reason} (")


def test_the_memory_checkers_watch_this_librarys_kernels(monkeypatch, tmp_path):
    checker = tmp_path / "compute-sanitizer"
    checker.write_text('#!/bin/sh\necho "$@"\nexit 9\n')
    checker.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    parts = list(_full_verification.run_parts(["sanitizer"], [torch.device("cuda")], tmp_path / "logs", 20))
    assert [part.name.split(",")[0] for part in parts] == ["memcheck", "racecheck", "synccheck", "initcheck"]
    assert {part.status for part in parts} == {"failed"}
    words = (tmp_path / "logs" / "racecheck.txt").read_text()
    assert "--tool racecheck" in words and "kernel_substring=shike" in words and "device_smoke.py cuda" in words
    monkeypatch.setenv("PATH", "/nowhere")
    (part,) = _full_verification.run_parts(["sanitizer"], [torch.device("cuda")], tmp_path / "logs", 20)
    assert (part.status, part.reason) == ("not tried", "compute-sanitizer is not on PATH")


def test_an_installed_package_has_no_tests(monkeypatch, tmp_path):
    monkeypatch.setattr(_full_verification, "CHECKOUT", tmp_path)
    (part,) = _full_verification.run_parts(["triton"], [torch.device("cuda")], tmp_path / "logs", 20)
    assert (part.status, part.reason) == ("not tried", "tests and benchmarks are in a checkout only")


def test_a_run_says_what_it_runs_on_and_verifies_once(programs, tmp_path):
    runs = Runs(tmp_path, programs)
    command = [sys.executable, "-m", "shike_fast.train", "--epochs", 1, "--stage2-epochs", 0, "--model", "resnet8"]
    environment = {**os.environ, "SHIKE_FAST_CACHE": str(tmp_path / "cache")}
    told = []
    for name in ("first", "second"):
        done = programs.run([*command, "--output-dir", tmp_path / name], env=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert re.search(r"^kernels: cpu \(verified on this CPU\)$", done.stdout, re.MULTILINE), done.stdout
        told.append(bool(re.search(r"^shike_fast: verifying kernels on .+, once: \d+ s$", done.stderr, re.MULTILINE)))
    assert told == [True, False]
    assert runs.metrics(tmp_path / "second")
