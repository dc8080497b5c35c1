"""The benchmarks' documents: docs/benchmarks.md is what benchmarks/report.py makes of the recorded runs."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def report():
    specification = importlib.util.spec_from_file_location("benchmark_report", ROOT / "benchmarks" / "report.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_document_is_generated(report):
    assert (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8") == report.document()


def test_unverified_backends_are_named(report, monkeypatch):
    text = report.document()
    for name in ("triton", "cuda"):
        assert (f"- `{name}` has never passed its tests on a device" in text) == bool(report._backend.unverified(name))
    monkeypatch.setattr(report._backend, "unverified", lambda name: [])
    assert "Every backend has passed its tests on a device." in report.document()


def test_a_recorded_run(tmp_path, report, monkeypatch):
    """A short run of one benchmark, recorded as JSON, becomes a table with every contender, the fastest first."""
    recorded = tmp_path / "run.json"
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(ROOT / "benchmarks" / "bench_expert_loss.py"),
        "--benchmark-only",
        "-q",
    ]
    command += ["-k", "128 and (dkt or peer)", f"--benchmark-json={recorded}", "-p", "no:cacheprovider"]
    command += ["--benchmark-max-time=0.01", "--benchmark-min-rounds=2", "-p", "no:cov"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(recorded.read_text())
    assert "node" not in results["machine_info"]
    infos = {result["extra_info"]["contender"]: result["extra_info"] for result in results["benchmarks"]}
    assert {"reference", "cpu", "compiled reference", "peer"} <= set(infos)
    logit_bytes, state_bytes = 3 * 128 * 100 * 4, 128 * 19 * 4
    assert logit_bytes <= infos["cpu"]["peak_extra_bytes"] <= logit_bytes + state_bytes + 512
    assert infos["reference"]["peak_extra_bytes"] > 3 * logit_bytes

    monkeypatch.setattr(report, "RESULTS", tmp_path)
    text = report.document()
    assert "### `dkt_loss` ((3, 128, 100), float32), cpu (copy: " in text
    table = text.split("### `dkt_loss` ((3, 128, 100), float32), cpu")[1].split("###")[0]
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")][1:]
    assert {row[0].removeprefix("| ") for row in rows} == {"reference", "cpu", "compiled reference"}
    times = [float(row[1].removesuffix(" ms")) for row in rows]
    assert times == sorted(times) and rows[0][2] == "1.00"


def test_device_suite_is_a_script_that_bash_reads():
    script = ROOT / "benchmarks" / "device_suite.sh"
    assert script.stat().st_mode & 0o100
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_smoke_run_on_the_cpu():
    command = [sys.executable, str(ROOT / "benchmarks" / "device_smoke.py"), "cpu", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "every kernel ran\n"), done.stderr
