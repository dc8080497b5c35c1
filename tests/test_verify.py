"""``python -m shike_fast.verify``, and what ``train`` says of the kernels it runs."""

import json
import os
import re
import sys

import pytest
from runs import Runs

from shike_fast import ops, verify
from shike_fast.ops import _verification
from shike_fast.ops._dispatch import OPERATORS
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
        (["--backend", "cpu"], "unrecognized arguments: --backend cpu"),
    ],
)
def test_bad_arguments(capsys, arguments, message):
    assert verify.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1


def test_a_run_says_what_it_runs_on_and_verifies_once(programs, tmp_path):
    runs = Runs(tmp_path, programs)
    command = [sys.executable, "-m", "shike_fast.train", "--epochs", 1, "--stage2-epochs", 0, "--model", "resnet8"]
    environment = {**os.environ, "SHIKE_FAST_CACHE": str(tmp_path / "cache")}
    told = []
    for name in ("first", "second"):
        done = programs.run([*command, "--output-dir", tmp_path / name], env=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert re.search(r"^kernels: cpu \(verified on this CPU\)$", done.stdout, re.MULTILINE), done.stdout
        told.append("verifying kernels on cpu, once\n" in done.stderr)
    assert told == [True, False]
    assert runs.metrics(tmp_path / "second")
