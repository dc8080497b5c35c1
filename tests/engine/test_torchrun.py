"""The commands below torchrun: two processes train one model, and are restarted when one is killed."""

import contextlib
import csv
import functools
import json
import os
import re
import signal
import socket
import sys

import pytest
from programs import descendants

from shike_fast.engine.distributed import launch
from shike_fast.engine.run import make_plan
from shike_fast.errors import ConfigError
from shike_fast.evaluate import main as evaluate_command


class Torchrun:
    """The training command in two processes."""

    def __init__(self, programs, folder, *arguments, restarts=0, program=("-m", "shike_fast.train")):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        launcher += ["--max-restarts", restarts, "--local-addr", "localhost"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.programs = programs
        self.process = programs.start([*launcher, *program, *arguments], cwd=folder, env=environment)

    def wait_for(self, condition):
        self.programs.wait_until(condition, self.process)

    def finish(self):
        done = self.programs.finish(self.process)
        return done.returncode, done.stdout, done.stderr

    def workers(self):
        """Process numbers by rank."""
        ranks = {}
        for pid in descendants(self.process.pid):
            with open(f"/proc/{pid}/environ", "rb") as file:
                found = re.search(rb"(?:^|\0)RANK=(\d+)", file.read())
            if found:
                ranks.setdefault(int(found[1]), pid)  # not a process that it started
        return ranks


@pytest.fixture
def torchrun(programs, tmp_path):
    return functools.partial(Torchrun, programs, tmp_path)


SMALL = ["--model", "resnet8", "--batch-size", "64", "--epochs", "4", "--stage2-epochs", "1", "--sync-batch-norm"]


def test_the_command_in_two_processes(torchrun, runs, tmp_path):
    status, output, errors = torchrun(*SMALL, "--output-dir", tmp_path / "two", "--accumulate", 2).finish()
    assert status == 0, errors
    assert output.count("writing to") == 1 and "2 processes on cpu" in output
    rows = runs.metrics(tmp_path / "two")
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    last = runs.checkpoint(tmp_path / "two" / "last.pt")
    assert not [name for name in last["model"] if "module" in name]
    assert sum(last["evaluation"]["support"]) == 600  # every test image once
    config = json.loads((tmp_path / "two" / "config.json").read_text())
    assert config["accumulate"] == 2 and config["sync_batch_norm"] is True


@pytest.mark.slow
def test_all_processes_test_the_model_that_is_saved(torchrun, runs, tmp_path):
    """Without synchronised statistics each has statistics of its own; the first one's are the model's."""
    arguments = [option for option in SMALL if option != "--sync-batch-norm"]
    arguments += ["--batch-size", 16, "--epochs", 5, "--stage2-epochs", 0, "--output-dir", tmp_path / "two"]
    status, _, errors = torchrun(*arguments).finish()
    assert status == 0, errors
    state = runs.checkpoint(tmp_path / "two" / "last.pt")
    assert evaluate_command(["--checkpoint", str(tmp_path / "two" / "last.pt"), "--csv", str(tmp_path / "a.csv")]) == 0
    with open(tmp_path / "a.csv", newline="") as file:
        correct = [int(row["correct"]) for row in csv.DictReader(file)]
    assert correct == state["evaluation"]["correct"].tolist()
    assert sum(correct) > 600 // 4  # enough that other statistics classify otherwise


@pytest.mark.slow
def test_two_processes_train_like_one(torchrun, runs, tmp_path):
    # More threads, or larger steps, would magnify the rounding.
    arguments = [*SMALL, "--epochs", 1, "--stage2-epochs", 0, "--threads", 1, "--lr", 0.001]
    status, _, errors = torchrun(*arguments, "--output-dir", tmp_path / "two").finish()
    assert status == 0, errors
    assert runs.train(*arguments, "--output-dir", tmp_path / "one") == 0
    (two,), (one,) = runs.metrics(tmp_path / "two"), runs.metrics(tmp_path / "one")
    assert two["train_loss"] == pytest.approx(one["train_loss"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_worker_is_restarted_and_no_epoch_is_lost(torchrun, runs, tmp_path, rank):
    directory = tmp_path / "run"
    launched = torchrun(
        *SMALL, "--epochs", 12, "--stage2-epochs", 2, "--output-dir", directory, "--threads", 1, restarts=2
    )
    launched.wait_for(lambda: runs.epochs(directory) >= 1)
    workers = launched.workers()
    launched.wait_for(lambda: runs.epochs(directory) >= 3)
    os.kill(workers[rank], signal.SIGKILL)
    status, output, errors = launched.finish()
    assert status == 0, errors[-3000:]
    assert re.search(r"going on after epoch \d+", output)
    rows = runs.metrics(directory)
    assert [row["epoch"] for row in rows] == list(range(1, 13))
    state = runs.checkpoint(directory / "last.pt")
    assert state["epoch"] == 12 and [row["epoch"] for row in state["history"]] == list(range(1, 13))


MIXED = ["--method", "ce", "--model", "resnet8", "--batch-size", "64", "--epochs", "20", "--threads", "1"]
MIXED += ["--mixup", "0.4", "--cutmix", "1", "--ema", "0.9", "--nesterov", "--schedule", "step", "--trunk-lr", "0.02"]


@pytest.mark.slow
def test_a_mixed_and_averaged_run_in_two_processes_is_resumed(torchrun, runs, tmp_path):
    """Everything that is drawn is a function of the step, so a stopped run ends as one that was not."""
    status, _, errors = torchrun(*MIXED, "--output-dir", tmp_path / "whole").finish()
    assert status == 0, errors[-3000:]
    launched = torchrun(*MIXED, "--output-dir", tmp_path / "stopped")
    launched.wait_for(lambda: runs.epochs(tmp_path / "stopped") >= 2)
    os.kill(launched.workers()[0], signal.SIGTERM)
    assert launched.finish()[0] != 0
    assert 2 <= runs.checkpoint(tmp_path / "stopped" / "last.pt")["epoch"] < 20
    status, _, errors = torchrun("--output-dir", tmp_path / "stopped", "--resume").finish()
    assert status == 0, errors[-3000:]
    for name in ("last.pt", "best.pt"):
        runs.assert_same_weights(tmp_path / "whole" / name, tmp_path / "stopped" / name)
    assert runs.reproducible_metrics(tmp_path / "whole") == runs.reproducible_metrics(tmp_path / "stopped")


@pytest.mark.slow
def test_a_series_of_seeds_whose_worker_is_killed_is_restarted_and_ends_whole(torchrun, runs, tmp_path):
    """In its second run: the first one is not trained again."""
    directory = tmp_path / "runs"
    arguments = [*SMALL, "--epochs", 8, "--stage2-epochs", 2, "--threads", 1, "--seeds", 2, "--output-dir", directory]
    launched = torchrun(*arguments, restarts=2)
    launched.wait_for(lambda: runs.epochs(directory / "seed-1") >= 2)
    os.kill(launched.workers()[1], signal.SIGKILL)
    status, output, errors = launched.finish()
    assert status == 0, errors[-3000:]
    assert f"seed 0 is finished: {directory / 'seed-0'}" in output
    assert output.count("2 seeds: test accuracy") == 1
    for seed in (0, 1):
        assert [row["epoch"] for row in runs.metrics(directory / f"seed-{seed}")] == list(range(1, 9))
        assert sum(runs.checkpoint(directory / f"seed-{seed}" / "last.pt")["evaluation"]["support"]) == 600
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["last"]["top1"]["values"] == [
        runs.metrics(directory / f"seed-{seed}")[-1]["top1"] for seed in (0, 1)
    ]


@pytest.mark.slow
def test_sigterm_ends_a_series_in_all_processes(torchrun, runs, tmp_path):
    launched = torchrun(*SMALL, "--epochs", 400, "--seeds", 2, "--output-dir", tmp_path / "runs")
    launched.wait_for(lambda: runs.epochs(tmp_path / "runs" / "seed-0"))
    os.kill(launched.workers()[1], signal.SIGTERM)
    status, _, errors = launched.finish()
    assert status != 0
    assert errors.count("the same command with --resume resumes the series of seeds") == 1, errors[-3000:]
    assert not (tmp_path / "runs" / "seed-1").exists()


@pytest.mark.slow
def test_sigterm_saves_and_ends_all(torchrun, runs, tmp_path):
    directory = tmp_path / "run"
    launched = torchrun(*SMALL, "--epochs", 400, "--output-dir", directory)
    launched.wait_for(lambda: runs.epochs(directory))
    os.kill(launched.workers()[1], signal.SIGTERM)
    status, _, errors = launched.finish()
    assert status != 0
    assert errors.count("stopped by SIGTERM; state saved in") == 1, errors[-3000:]
    assert runs.checkpoint(directory / "last.pt")["epoch"] >= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "nothing"], "error: --dataset: unknown data set 'nothing'"),
        (["--bogus"], "error: unrecognized arguments: --bogus"),
        ([*SMALL, "--batch-size", 382], "error: --batch-size: "),
        ([*SMALL, "--lr", 1e30], "error: the loss is not finite at step "),
    ],
)
def test_an_error_in_two_processes_is_told_once(torchrun, arguments, message):
    status, _, errors = torchrun(*arguments).finish()
    assert status != 0
    assert errors.count(message) == errors.count("error: ") == 1, errors


_SLOW_TO_TELL = """
import gc, os, sys, time
from shike_fast.train import main
if os.environ["RANK"] == "0":
    if "--bogus" in sys.argv:
        time.sleep(1)
    collect = gc.collect  # the first of what is done before the message is printed
    gc.collect = lambda: (time.sleep(3), collect())
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "nothing"], "error: --dataset: unknown data set 'nothing'"),
        (["--bogus"], "error: unrecognized arguments: --bogus"),
    ],
)
def test_others_wait_until_the_first_process_has_told(torchrun, tmp_path, arguments, message):
    """At the end of one process torchrun stops the others, half a second later at the latest."""
    (tmp_path / "slow.py").write_text(_SLOW_TO_TELL)
    status, _, errors = torchrun(*arguments, program=[tmp_path / "slow.py"]).finish()
    assert status != 0
    assert errors.count(message) == errors.count("error: ") == 1, errors


@pytest.mark.slow
def test_a_start_that_is_refused_stays_refused_when_restarted(torchrun, runs, tmp_path):
    """torchrun starts anew whatever ended with an error: the second time must not take over what the first may not."""
    directory = tmp_path / "old"
    assert runs.train(*runs.small, "--output-dir", directory) == 0
    before = {path: path.read_bytes() for path in directory.iterdir()}
    status, _, errors = torchrun(*SMALL, "--output-dir", directory, restarts=1).finish()
    assert status != 0
    assert errors.count(f"error: --output-dir: {directory} is not empty; add --resume") == 2  # once each time
    assert {path: path.read_bytes() for path in directory.iterdir()} == before


@pytest.fixture
def restarted(monkeypatch):
    """As if torchrun had started this process for the second time."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "some run")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")


@pytest.mark.usefixtures("restarted")
def test_a_restart_before_the_first_checkpoint_is_like_the_start(finished, tmp_path):
    with contextlib.ExitStack() as held:
        plan = make_plan({"resume": str(finished / "last.pt"), "output_dir": tmp_path / "new"}, held)
        assert plan.state is not None and plan.config.epochs == 3 and plan.new_directory
        with pytest.raises(ConfigError, match=r"--resume: .* holds no checkpoint"):
            make_plan({"resume": True, "output_dir": tmp_path / "new"}, held)


@pytest.mark.usefixtures("restarted")
def test_a_restart_goes_on_with_the_run_of_its_own_launch(runs, tmp_path, monkeypatch):
    directory = tmp_path / "run"
    assert runs.train(*runs.small, "--output-dir", directory) == 0  # signs it
    for run_id, goes_on in (("some run", True), ("another", False)):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", run_id)
        with contextlib.ExitStack() as held:
            if goes_on:
                plan = make_plan({"output_dir": directory}, held)
                assert plan.state["epoch"] == 3 and not plan.new_directory
            else:
                with pytest.raises(ConfigError, match="is not empty; add --resume"):
                    make_plan({"output_dir": directory}, held)


def test_a_launch_has_a_name(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert launch() == ""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    names = []
    for folder in ("x_one/attempt_0", "x_one/attempt_1", "x_two/attempt_0"):
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", f"/tmp/torchelastic_1/{folder}/0/error.json")
        names.append(launch())
    assert names[0] == names[1] != names[2] and names[0].startswith("x ")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "")
    assert launch() == f"x {socket.gethostname()} "


_NAMES_ITSELF = """
import os, sys
from shike_fast.engine.distributed import launch
if os.environ["RANK"] == "0":
    with open(sys.argv[1], "a") as file:
        print(launch(), file=file)
    sys.exit(os.environ["TORCHELASTIC_RESTART_COUNT"] == "0")
"""


@pytest.mark.slow
def test_the_name_of_a_launch_stays_in_a_restart_and_is_no_other_launch_s(torchrun, tmp_path):
    (tmp_path / "names.py").write_text(_NAMES_ITSELF)
    for _ in range(2):
        status, _, errors = torchrun(tmp_path / "names", restarts=1, program=[tmp_path / "names.py"]).finish()
        assert status == 0, errors[-3000:]
    names = (tmp_path / "names").read_text().splitlines()
    assert len(names) == 4 and names[0] == names[1] and names[2] == names[3]
    assert names[0].split()[1:] != names[2].split()[1:]  # whatever the id of the run


@pytest.mark.slow
def test_restarts_need_a_directory(torchrun):
    status, _, errors = torchrun(*SMALL, restarts=1).finish()
    assert status != 0
    assert "error: --output-dir: name it, so that processes that torchrun restarts find what they had saved" in errors


@pytest.mark.slow
def test_a_batch_too_small_for_its_processes(torchrun, tmp_path):
    status, _, errors = torchrun(*SMALL, "--accumulate", 20, "--output-dir", tmp_path / "run").finish()
    assert status != 0
    assert (
        "--batch-size: counts the images of all processes; 2 processes with --accumulate 20 need at least 80" in errors
    )
    assert not (tmp_path / "run").exists()
