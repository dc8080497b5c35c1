"""The benchmarks' documents: docs/records/benchmarks.md is what benchmarks/report.py makes of the recorded runs."""

import importlib.util
import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def report():
    specification = importlib.util.spec_from_file_location("benchmark_report", ROOT / "benchmarks" / "report.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_document_is_generated(report):
    assert (ROOT / "docs" / "records" / "benchmarks.md").read_text(encoding="utf-8") == report.document()


def test_devices_of_recorded_runs_are_named(report):
    def run(**info):
        return {"benchmarks": [{"extra_info": info}]}

    nothing = "\n".join(report._devices([run(device="some processor")]))
    assert "No run on a GPU is recorded yet" in nothing and "some processor" not in nothing
    runs = [run(device="NVIDIA H100", launches=2), run(device="some processor")]
    assert "Recorded on: NVIDIA H100.\n" in "\n".join(report._devices(runs))


@pytest.mark.slow
def test_a_recorded_run(programs, tmp_path, report, monkeypatch):
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
    done = programs.run(command, cwd=tmp_path)
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
    assert "### `dkt_loss`, cpu (copy: " in text
    table = text.split("### `dkt_loss`, cpu")[1].split("###")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| ")][
        1:
    ]
    assert [row[0] for row in rows] == ["(3, 128, 100) float32", "", ""]
    assert {row[1] for row in rows} == {"reference", "cpu", "compiled reference"}
    times = [float(row[2]) for row in rows]
    assert times == sorted(times) and rows[0][3] == "1.00"


@pytest.mark.slow
def test_a_quick_round_of_a_methods_loss(programs, tmp_path):
    """Both contenders have the same value, also compiled; nothing is recorded."""
    bench = ROOT / "benchmarks" / "bench_method_loss.py"
    command = [sys.executable, "-m", "pytest", str(bench), "-k", "focal and 128", "--benchmark-disable", "-q"]
    done = programs.run([*command, "-p", "no:cacheprovider", "-p", "no:cov"], cwd=tmp_path)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr


@pytest.fixture
def bench_train(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # it imports its peer
    specification = importlib.util.spec_from_file_location("bench_train", ROOT / "benchmarks" / "bench_train.py")
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "bench_train", module)  # where its dataclass looks for itself
    specification.loader.exec_module(module)
    yield module
    sys.modules.pop("peer", None)


@pytest.mark.slow
def test_training_loops(bench_train):
    """A training step of either contender, whole and in phases, with and without a loader."""
    device = torch.device("cpu")
    for epoch in (0, 3):
        case = bench_train.Case("resnet8", 10, 4, 32, "off", steps=2, rounds=1, epoch=epoch)
        peer, ours = bench_train.Peer(case, device), bench_train.ShikeFast(case, device)
        if epoch:
            peer.choose_workers(time.perf_counter)
            assert peer.workers in (0, min(bench_train.MOST_WORKERS, os.cpu_count() or 1))
        for contender in (peer, ours):
            before = [parameter.clone() for parameter in contender.network.parameters()]
            for _ in range(3):
                contender.step()
            shares = bench_train.shares(contender, 2, time.perf_counter)
            assert list(shares) == ["loader", "forward", "loss", "backward", "optimizer"]
            assert abs(sum(shares.values()) - 1) < 1e-3 and min(shares.values()) >= 0
            after = [parameter for parameter in contender.network.parameters() if parameter.grad is not None]
            assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=False))
        assert int(ours.totals.steps) == 1 + 3 + 2
        peer.batches = None  # ends its workers


def test_contenders_side_by_side(tmp_path, report, monkeypatch):
    """What is timed in alternation has a table of its own: ratios are the median of those within a round."""
    phases = ("loader", "forward", "loss", "backward", "optimizer")
    contenders = {
        "peer": {
            "seconds": [0.2, 0.8, 0.4],
            "shares": dict.fromkeys(phases, 0.2),
            "workers": 2,
            "peak_extra_bytes": 3 * 2**20,
        },
        "shike_fast": {
            "seconds": [0.1, 0.2, 0.4],
            "shares": dict(zip(phases, (0.05, 0.3, 0.05, 0.5, 0.1), strict=True)),
            "workers": 0,
            "peak_extra_bytes": 2**20,
        },
    }
    facts = {"op": "training step", "case": "tiny", "device": "cpu", "threads": 2, "torch": "2"}
    run = {
        "machine_info": {"cpu": {"brand_raw": "a processor"}, "processor": "", "python_version": "3"},
        "commit_info": {"id": "0123456789abcdef"},
        "datetime": "2026-01-02T03:04:05",
        "benchmarks": [{"extra_info": {**facts, "images": 128, "calls": 2, "contenders": contenders}}],
    }
    (tmp_path / "run.json").write_text(json.dumps(run))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    table = report.document().split("### `training step`, cpu\n")[1]
    assert table == (
        "\n| case | | time (ms) | images/s | times `peer` | loader (%) | forward (%) | loss (%) | backward (%) "
        "| optimizer (%) | memory (MiB) |\n"
        "|---|---|---|---|---|---|---|---|---|---|---|\n"
        "| tiny | peer | 400.0 | 320.0 | 1.00 | 20.0 | 20.0 | 20.0 | 20.0 | 20.0 | 3 |\n"
        "| | shike_fast | 200.0 | 640.0 | 2.00 | 5.0 | 30.0 | 5.0 | 50.0 | 10.0 | 1 |\n"
        "\n"
        "Worker processes: tiny: `peer` 2; the others load in the training process.\n"
    )

    for contender in contenders.values():  # optimizers have no phases, no loader and no images
        del contender["shares"], contender["workers"]
    run["benchmarks"][0]["extra_info"].pop("images")
    contenders["shike_fast"]["seconds"] = [0.001, 0.002, 0.004]
    (tmp_path / "run.json").write_text(json.dumps(run))
    table = report.document().split("### `training step`, cpu\n")[1]
    assert table.startswith(
        "\n| case | | time (ms) | times `peer` | memory (MiB) |\n|---|---|---|---|---|\n| tiny | peer | 400.0 | 1.00 |"
    )
    assert "| | shike_fast | 2.000 | 200.00 | 1 |" in table
    assert "Worker" not in table


def test_methods_line_by_line(tmp_path, report, monkeypatch):
    """Many cases with the same contenders have a line each."""

    def info(case, *seconds):
        names = ("peer", "peer, torch.compile", "shike_fast")
        contenders = {
            name: {"seconds": [s, 2 * s], "peak_extra_bytes": 2**20} for name, s in zip(names, seconds, strict=True)
        }
        facts = {"op": "loss of a method", "case": case, "device": "cpu", "threads": 2, "torch": "2", "compact": True}
        return {"extra_info": facts | {"contenders": contenders}}

    run = {
        "machine_info": {"cpu": {"brand_raw": "a processor"}, "processor": "", "python_version": "3"},
        "commit_info": {"id": "0123456789abcdef"},
        "datetime": "2026-01-02T03:04:05",
        "benchmarks": [info("sade (3, 128, 100)", 0.004, 0.002, 0.001), info("la (3, 128, 100)", 0.04, 0.02, 0.005)],
    }
    (tmp_path / "run.json").write_text(json.dumps(run))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    table = report.document().split("### `loss of a method`, cpu\n")[1]
    assert table == (
        "\n| case | peer (ms) | peer, torch.compile (ms) | shike_fast (ms) | peer, torch.compile, times `peer` "
        "| shike_fast, times `peer` | peer (MiB) | peer, torch.compile (MiB) | shike_fast (MiB) |\n"
        "|---|---|---|---|---|---|---|---|---|\n"
        "| sade (3, 128, 100) | 6.000 | 3.000 | 1.500 | 2.00 | 4.00 | 1.0 | 1.0 | 1.0 |\n"
        "| la (3, 128, 100) | 60.0 | 30.0 | 7.500 | 2.00 | 8.00 | 1.0 | 1.0 | 1.0 |\n"
    )


def test_accuracies_of_two_paths(tmp_path, report, monkeypatch):
    def summary(*values):
        return {"values": values, "mean": 80.0 + len(values), "standard_error": 0.3 if len(values) == 3 else 0.4}

    record = {
        "settings": {"dataset": "digits-lt", "model": "resnet8", "epochs": 10, "stage2_epochs": 2},
        "seeds": [0, 1, 2],
        "device": "cpu",
        "threads": 1,
        "torch": "2",
        "cpu_seconds": {"fast": [9.0, 10.2, 11.0], "plain": [20.0, 30.0, 40.0]},
        "paths": {"fast": {"top1": summary(1, 2, 3)}, "plain": {"top1": summary(1, 2)}},
    }
    (tmp_path / "fast_against_plain").mkdir()
    (tmp_path / "fast_against_plain" / "some-day.json").write_text(json.dumps(record))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    text = report.document().split("## Accuracy, some-day\n")[1]
    assert "`digits-lt`, resnet8, 8+2 epochs, 3 seeds, cpu, 1 thread, PyTorch 2; test accuracy (%)" in text
    assert max(map(len, text.splitlines())) <= 120
    assert text.endswith(
        "| | top1 | CPU seconds a run |\n|---|---|---|\n| fast | 83.00 ± 0.30 | 10 |\n| plain | 82.00 ± 0.40 | 30 |\n"
        "\n`fast` less `plain`, and the standard error of that: top1 +1.00 ± 0.50.\n"
    )


@pytest.mark.slow
def test_accuracy_of_either_path(tmp_path, monkeypatch):
    """A run of the command and one of the peer's loop, as short as they can be."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    specification = importlib.util.spec_from_file_location("accuracy", ROOT / "benchmarks" / "accuracy.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    arguments = ["try", "--dataset", "digits-lt", "--epochs", "2", "--stage2-epochs", "1", "--seeds", "2"]
    monkeypatch.setattr(sys, "argv", ["accuracy.py", *arguments, "--device", "cpu"])
    module.main()
    sys.modules.pop("peer", None)
    record = json.loads((tmp_path / "try.json").read_text())
    assert record["settings"]["scale"] == 30 and record["seeds"] == [0, 1]
    for path in ("fast", "fast, bf16", "plain"):
        assert set(record["paths"][path]) == {"top1", "many", "medium", "few"}
        for summary in record["paths"][path].values():
            assert len(summary["values"]) == 2 and all(0 <= value <= 100 for value in summary["values"])
            assert summary["mean"] == pytest.approx(sum(summary["values"]) / 2)
            assert summary["standard_error"] == pytest.approx(abs(summary["values"][0] - summary["values"][1]) / 2)


def test_device_suite_is_a_script_that_bash_reads(programs):
    script = ROOT / "benchmarks" / "device_suite.sh"
    assert script.stat().st_mode & 0o100
    done = programs.run(["bash", "-n", script])
    assert (done.returncode, done.stderr) == (0, "")


def test_smoke_run_on_the_cpu(programs):
    command = [sys.executable, str(ROOT / "benchmarks" / "device_smoke.py"), "cpu", "cpu"]
    done = programs.run(command)
    assert (done.returncode, done.stdout) == (0, "every kernel ran\n"), done.stderr
