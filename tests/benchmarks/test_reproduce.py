"""The queue of reproductions: runs that are skipped, gone on with and recorded, and the document made of them."""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from shike_fast.engine.config import resolve
from shike_fast.errors import CheckpointError
from shike_fast.train import make_parser

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "reproduce.py"


@pytest.fixture
def reproduce(monkeypatch, tmp_path):
    """The script, with a table of two short rows on digits, writing below the temporary directory."""
    monkeypatch.syspath_prepend(SCRIPT.parent)  # it imports what is beside it
    specification = importlib.util.spec_from_file_location("reproduce", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "reproduce", module)  # where its dataclasses look for themselves
    specification.loader.exec_module(module)
    module.published_rows = module.ROWS
    options = ("--model", "resnet8", "--batch-size", "64", "--epochs", "3")
    module.ROWS = (
        module.Row("quick", "digits-lt", options, {"top1": 90.5}, "nowhere"),
        module.Row("plain", "digits-lt", (*options, "--method", "ce"), {}, "not published"),
    )
    module.RESULTS, module.DOCUMENT = tmp_path / "results", tmp_path / "results.md"
    yield module
    for name in ("results_page", "run_queue"):
        sys.modules.pop(name, None)


def call(reproduce, runs, *arguments):
    return reproduce.main(["digits-lt", "--runs", str(runs), *arguments])


def child_of(parent):
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if int((path / "stat").read_text().rsplit(")", 1)[1].split()[1]) == parent:
                return int(path.name)
    raise AssertionError(f"process {parent} has no child")


def result_of(**changes):
    history = [3.0, 20.0, 48.1, 50.0]
    result = {
        "row": "shike-if100",
        "dataset": "cifar100-lt",
        "imbalance_factor": 100.0,
        "subset": "first",
        "method": "shike",
        "model": "resnet32",
        "seed": 0,
        "epochs": 4,
        "stage2_epochs": 1,
        "last": {"top1": 50.0, "many": 70.0, "medium": 50.0, "few": 30.0},
        "best": {"top1": 51.0, "many": 70.0, "medium": 51.0, "few": 32.0, "epoch": 3},
        "stage1": {"top1": 48.1, "many": 75.0, "medium": 45.0, "few": 10.0},
        "hours": 1.5,
        "hardware": "A processor",
        "torch": "2",
        "commit": "0123456789",
        "finished": "2026-01-01",
        "command": "python -m shike_fast.train",
        "curve": {"top1": history, "train_loss": [4.0, 3.0, 2.0, 1.0]},
        "class_accuracy": [70.0 - k / 2 for k in range(100)],
        "class_counts": [int(500 * 0.01 ** (k / 99)) for k in range(100)],
    }
    return result | changes


def test_the_row_of_the_paper_is_the_default_recipe(reproduce):
    """What a user gets from the bare command is the run in the table."""
    row = reproduce.published_rows[0]
    given = vars(make_parser().parse_args(reproduce.Run(row, 0, Path("runs")).command("")[3:]))
    assert given == {"dataset": "cifar100-lt"}
    config = resolve(given)
    assert (config.method, config.model, config.num_experts, config.imbalance_factor) == ("shike", "resnet32", 3, 100)
    assert (config.epochs, config.stage2_epochs, config.subset, config.augmentation) == (200, 20, "first", "cifar")


def test_rows_have_names_of_their_own_and_options_that_the_command_takes(reproduce):
    names = [(row.dataset, row.name) for row in reproduce.published_rows]
    assert len(set(names)) == len(names)
    for row in reproduce.published_rows:
        run = reproduce.Run(row, 2, Path("runs"))
        config = resolve(vars(make_parser().parse_args(run.command("data")[3:])))
        epochs, published = row.schedule or (200, 200)
        assert (config.seed, config.data_dir, config.epochs) == (2, "data", epochs)
        full = dataclasses.replace(row, schedule=None)
        assert resolve(vars(make_parser().parse_args(reproduce.Run(full, 2, Path("runs")).command("")[3:]))).epochs == (
            published
        )


SHORT = {
    "balpoe": ("ldam", 3, (32, 36), 0),
    "shike": ("first", 3, None, 4),
    "ride": ("ldam", 3, (32, 36), 0),
    "sade": ("ldam", 3, (32, 36), 0),
    "ldam-drw": ("ldam", 1, (32, 36), 0),
    "la": ("ldam", 1, None, 0),
    "ce": ("ldam", 1, None, 0),
}
"""Of each method's short run: subset, experts, steps of the rate, epochs of stage 2."""


def test_the_short_schedule_keeps_the_shares_of_the_published_one(reproduce):
    rows = [row for row in reproduce.published_rows if row.schedule is not None]
    seen = {}
    for row in rows:
        config = resolve(vars(make_parser().parse_args(reproduce.Run(row, 0, Path("runs")).command("")[3:])))
        assert row.name == f"{config.method}-short"
        assert (config.imbalance_factor, config.model, config.epochs) == (100, "resnet32", 40)
        steps = tuple(config.step_epochs) if config.schedule == "step" else None
        seen[config.method] = (config.subset, config.num_experts, steps, config.stage2_epochs)
        method = config.create_method(torch.arange(100, 0, -1))
        if config.method in ("ride", "ldam-drw"):
            assert [method.phase(epoch) for epoch in (31, 32)] == [0, 32]  # as after 160 of 200
    assert seen == SHORT


def test_rows_are_taken_in_the_order_in_which_they_are_named(reproduce):
    parser = argparse.ArgumentParser()
    rows = reproduce.published_rows

    def names(*wanted):
        return [row.name for row in reproduce.chosen_rows(parser, rows, wanted)]

    assert names("ride-short", "shike-if50", "ride-short") == ["ride-short", "shike-if50"]
    assert names("short")[0] == "balpoe-short" and len(names("short")) == len(SHORT)
    assert names("ce-short", "short", "full")[0] == "ce-short"
    assert set(names("short", "full")) == {row.name for row in rows}


def test_document_is_generated(reproduce):
    written = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    results = [json.loads(path.read_text()) for path in sorted((SCRIPT.parent / "results" / "accuracy").glob("*.json"))]
    assert written == reproduce.results_page.document(reproduce.published_rows, results)


@pytest.mark.slow
def test_a_queue_trains_records_and_skips(reproduce, tmp_path, capfd):
    runs = tmp_path / "runs"
    assert call(reproduce, runs, "--seeds", "2", "--rows", "quick", "--options", "--amp off") == 0
    printed = capfd.readouterr().out
    assert "digits-lt-quick-seed1: finished, top-1 " in printed
    paths = sorted((tmp_path / "results").iterdir())
    assert [path.name for path in paths] == ["digits-lt-quick-seed0.json", "digits-lt-quick-seed1.json"]
    result = json.loads(paths[1].read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (runs / "digits-lt" / "quick-seed1" / "metrics.jsonl").open()]
    assert result["last"] == {name: round(rows[-1][name], 2) for name in ("top1", "many", "medium", "few")}
    assert result["best"]["top1"] == max(result["curve"]["top1"])
    assert result["stage1"]["top1"] == round(rows[1]["top1"], 2)
    assert result["hours"] == pytest.approx(sum(row["seconds"] for row in rows) / 3600, abs=0.005)
    assert (result["seed"], result["epochs"], result["method"], result["model"]) == (1, 3, "shike", "resnet8")
    assert result["command"].endswith(
        "--dataset digits-lt --model resnet8 --batch-size 64 --epochs 3 --seed 1 --amp off"
    )
    assert result["commit"] == (reproduce.run_queue.measured_on.commit() or "unknown")
    assert result["hardware"].endswith("cores")
    assert len(result["class_accuracy"]) == len(result["class_counts"]) == 10
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert "| `quick` | 90.5 | **" in text and " ± " in text
    assert "| `plain` | – | not run to its end yet |" in text

    again = {path: path.read_text() for path in paths}
    assert call(reproduce, runs, "--seeds", "2", "--rows", "quick") == 0
    assert {path: path.read_text() for path in paths} == again
    assert len((runs / "digits-lt" / "quick-seed1.sittings.jsonl").read_text().splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_queue_that_was_stopped_goes_on(reproduce, tmp_path, number):
    """SIGTERM reaches the run, which saves; a killed queue leaves a run that ends by itself or is killed as well."""
    long = ("--model", "resnet8", "--epochs", "400", "--stage2-epochs", "1")
    reproduce.ROWS = (dataclasses.replace(reproduce.ROWS[0], options=long),)
    runs = tmp_path / "runs"
    program = (
        f"import importlib.util, sys; from pathlib import Path; sys.path.insert(0, {str(SCRIPT.parent)!r})\n"
        f"s = importlib.util.spec_from_file_location('reproduce', {str(SCRIPT)!r})\n"
        "m = importlib.util.module_from_spec(s); sys.modules['reproduce'] = m; s.loader.exec_module(m)\n"
        f"m.ROWS = (m.Row('quick', 'digits-lt', {long!r}, {{}}, 'nowhere'),)\n"
        f"m.RESULTS, m.DOCUMENT = Path({str(tmp_path / 'results')!r}), Path({str(tmp_path / 'results.md')!r})\n"
        f"sys.exit(m.main(['digits-lt', '--runs', {str(runs)!r}, '--seeds', '1']))\n"
    )
    metrics = runs / "digits-lt" / "quick-seed0" / "metrics.jsonl"
    queue = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size):
        assert queue.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    child = child_of(queue.pid)
    queue.send_signal(number)
    if number == signal.SIGKILL:
        os.kill(child, number)
    _, errors = queue.communicate(timeout=60)
    if number == signal.SIGTERM:
        assert queue.returncode == 143
        assert "digits-lt-quick-seed0 ended with status 143; the same command resumes it" in errors
    before = reproduce.Run(reproduce.ROWS[0], 0, runs).history()
    assert 0 < len(before) < 400

    config = runs / "digits-lt" / "quick-seed0" / "config.json"
    assert json.loads(config.read_text())["epochs"] == 400
    called = []
    reproduce.run_queue.call = lambda command: called.append(command) or 7  # another 390 epochs would add nothing here
    assert call(reproduce, runs, "--seeds", "1") == 7
    [command] = called
    assert command[command.index("--resume") + 1] == "auto"
    assert command[command.index("--output-dir") + 1] == str(runs / "digits-lt" / "quick-seed0")
    sittings = (runs / "digits-lt" / "quick-seed0.sittings.jsonl").read_text().splitlines()
    assert [json.loads(line)["epochs_before"] for line in sittings] == [0, len(before)]
    assert not (tmp_path / "results").exists()  # no number of a run that did not finish


def test_a_run_that_fails_ends_the_queue(reproduce, tmp_path, capfd):
    broken = dataclasses.replace(reproduce.ROWS[0], options=("--model", "resnet9"))
    reproduce.ROWS = (broken, reproduce.ROWS[1])
    assert call(reproduce, tmp_path / "runs") == 2
    captured = capfd.readouterr()
    assert "--model: must be one of" in captured.err
    assert "digits-lt-plain-seed0: not begun" in captured.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rows", "long"), "--rows: long not among quick, plain, full, short"),
        (("--seeds", "0"), "--seeds: must be at least 1, got 0"),
    ],
)
def test_bad_arguments(reproduce, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        call(reproduce, tmp_path / "runs", *arguments)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_another_tree_than_the_imported_one(reproduce, tmp_path, capsys):
    reproduce.run_queue.ROOT = tmp_path
    with pytest.raises(SystemExit, match="2"):
        call(reproduce, tmp_path / "runs")
    assert "install this tree" in capsys.readouterr().err


def test_the_table_gives_mean_and_deviation_over_seeds(reproduce):
    results = [
        result_of(seed=seed, last={"top1": top1, "many": 70.0, "medium": 50.0, "few": None})
        for seed, top1 in enumerate((55.0, 56.0, 57.0))
    ]
    *_, line = reproduce.results_page.summary_table(reproduce.published_rows[:1], results)
    assert line == (
        "| `shike-if100` | 56.34 | **56.00 ± 1.00** | 70.00 ± 0.00 / 50.00 ± 0.00 / – | 51.00 ± 0.00 | "
        "48.10 ± 0.00 (published 48.1) | first | 0, 1, 2 | the authors' log; the paper has 56.3, 73.4 / 56.5 / "
        "36.0 for many / medium / few |"
    )


def test_sittings_on_other_machines_and_commits_are_all_named(reproduce):
    sittings = [{"commit": commit} for commit in ("a", "a", "b", None, "a")]
    assert reproduce.joined(sittings, "commit") == "a, then b, then unknown"


def test_sources_that_are_no_checkout_have_no_commit(reproduce, tmp_path, monkeypatch):
    """As in an unpacked sdist; the checkout around such a folder says nothing about it."""
    git = ("git", "-c", "user.name=A", "-c", "user.email=a@example.org", "-C", str(tmp_path))
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "--message", "first"], check=True)
    (tmp_path / "inside").mkdir()
    monkeypatch.setattr(reproduce.run_queue.measured_on, "ROOT", tmp_path / "inside")
    assert reproduce.run_queue.measured_on.commit() is None
    monkeypatch.setattr(reproduce.run_queue.measured_on, "ROOT", tmp_path)
    assert re.fullmatch("[0-9a-f]{10}", reproduce.run_queue.measured_on.commit())


def test_the_picture(reproduce, tmp_path):
    """Both methods in both halves; the document shows it where there are the two runs to draw."""
    plain = result_of(row="ce-if100", method="ce", stage1=None, stage2_epochs=0)
    reproduce.ROWS = reproduce.published_rows
    assert "](results-cifar100-lt.png)" not in reproduce.results_page.document(reproduce.ROWS, [result_of()])
    results = [result_of(), plain]
    assert "](results-cifar100-lt.png)" in reproduce.results_page.document(reproduce.ROWS, results)
    reproduce.load_results = lambda: results
    reproduce.write_report()
    assert (tmp_path / "results-cifar100-lt.png").read_bytes().startswith(b"\x89PNG")


def test_short_runs_have_a_section_of_their_own(reproduce):
    """Beside the published value of full length, and never in the picture."""
    rows = reproduce.published_rows
    results = [
        result_of(row="shike-short", epochs=40, stage2_epochs=4),
        result_of(row="ce-short", method="ce", epochs=40, stage1=None, subset="ldam"),
    ]
    text = reproduce.results_page.document(rows, results)
    full, short = text.split("### Short schedule: 40 of 200 epochs\n")
    assert "50.00" not in full and "](results-" not in text
    assert "| run | published, 200 epochs | ours, 40 epochs, last | many" in short
    assert "reproduce nothing" in short and "published values are of 200 epochs" in short
    assert "| `shike-short` | 56.34 | **50.00** | 70.00 / 50.00 / 30.00 | 51.00 | 48.10 | first | 0 | the" in short
    assert "| `ce-short` | 39.1 | **50.00** | 70.00 / 50.00 / 30.00 | 51.00 |  | ldam | 0 | model" in short
    assert "| `balpoe-short` | 51.98 | not run to its end yet |" in short
    assert short.count("`python -m shike_fast.train`") == 2
    results = [result_of(), result_of(row="ce-if100", method="ce", stage1=None), *results]
    pair = reproduce.results_page.shike_and_ce(rows, results, "cifar100-lt")
    assert [result["row"] for result in pair] == ["shike-if100", "ce-if100"]


def test_a_run_of_other_settings_is_not_gone_on_with(reproduce, tmp_path, capsys):
    run = reproduce.Run(reproduce.ROWS[0], 0, tmp_path)
    run.directory.mkdir(parents=True)
    config = resolve(vars(make_parser().parse_args(run.command("")[3:])))
    (run.directory / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    with pytest.raises(CheckpointError, match="batch_size is 64, the command line says 32"):
        call(reproduce, tmp_path, "--options", "--batch-size 32")
