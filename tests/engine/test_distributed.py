"""Several processes: the same weights as one, shares of the data, the command under torchrun, a killed worker."""

import socket
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist

from shike_fast import models
from shike_fast.data.loaders.loader import shard as share_of
from shike_fast.engine.config import resolve
from shike_fast.engine.distributed import PeerFailed, Processes, choose_device_of, join, launched
from shike_fast.engine.optimizer import set_lr
from shike_fast.engine.steps import StageSteps
from shike_fast.engine.totals import Totals
from shike_fast.errors import ConfigError, RunError
from shike_fast.nn import convert_sync_batchnorm

GLOBAL_BATCHES = (12, 13)


def ten_steps(images_of_all, processes, accumulate=1):
    """Ten steps of each stage in float64 with synchronised BatchNorm: all weights, statistics and totals."""
    torch.manual_seed(0)
    model = models.create_model("resnet8", num_classes=5).double().train()
    images = torch.randn(images_of_all, 3, 16, 16, dtype=torch.float64)
    labels = torch.randint(5, (images_of_all,))
    if processes.is_distributed:
        convert_sync_batchnorm(model)
    share = share_of(np.arange(images_of_all), processes.rank, processes.world_size)
    totals = Totals(torch.device("cpu"))
    config = resolve({"epochs": 2, "batch_size": 64, "accumulate": accumulate})
    for stage in (1, 2):
        steps = StageSteps(model, config, stage, class_counts=torch.arange(1, 6), processes=processes, totals=totals)
        set_lr(steps.optimizer, 0.05)
        for _ in range(10):
            steps(images[share], labels[share], images_of_all)
    return {**model.state_dict(), "totals": processes.total(totals.sums)}


def steps_here():
    processes = Processes(dist.get_rank(), dist.get_world_size())
    return [ten_steps(batch, processes) for batch in GLOBAL_BATCHES]


def agreements_here():
    """What the processes agree on, and how a failure of the first one reaches the other."""
    processes = Processes(dist.get_rank(), dist.get_world_size())
    results = {
        "largest": processes.largest(10 * processes.rank, torch.device("cpu")),
        "total": processes.total(torch.tensor([1.0, processes.rank])).tolist(),
        "said": processes.broadcast_from_main(lambda: f"said by {processes.rank}"),
    }

    def fail():
        raise ConfigError("no")

    try:
        processes.broadcast_from_main(fail)
    except (ConfigError, PeerFailed) as error:
        results["failure"] = (type(error).__name__, error.exit_status)
    for failing in ([0], [1], [0, 1]):

        def fail_there(failing=failing):
            if processes.rank in failing:
                raise ConfigError(f"no, says {processes.rank}")
            return processes.rank

        try:
            processes.run_on_all(fail_there)
        except (ConfigError, RunError) as error:
            results["together", *failing] = (type(error).__name__, error.exit_status, str(error))
    results["together"] = processes.run_on_all(lambda: processes.rank)
    model = torch.nn.BatchNorm2d(2)
    model.running_mean.fill_(float(processes.rank + 1))
    processes.send_buffers(model)
    results["buffers"] = model.running_mean.tolist()
    return results


@pytest.mark.slow
def test_two_processes_make_the_steps_of_one(two_processes):
    both = two_processes(steps_here)
    for number, batch in enumerate(GLOBAL_BATCHES):
        alone = ten_steps(batch, Processes())
        for results in both:
            for name, expected in alone.items():
                tolerance = 1e-9 if name != "totals" else 1e-6
                torch.testing.assert_close(
                    results[number][name], expected, rtol=tolerance, atol=tolerance, msg=lambda t, n=name: f"{n}: {t}"
                )


def uneven_parts_here():
    """Three images in two processes: two and one, which a step cannot cut into as many parts of their own."""
    return ten_steps(3, Processes(dist.get_rank(), dist.get_world_size()), accumulate=2)


@pytest.mark.slow
def test_processes_cut_their_shares_into_equally_many_parts(two_processes):
    first, second = two_processes(uneven_parts_here)
    alone = ten_steps(3, Processes())  # what one part each amounts to
    for name, expected in alone.items():
        for found in (first[name], second[name]):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6, msg=lambda t, n=name: f"{n}: {t}")


def test_processes_agree(two_processes):
    first, second = two_processes(agreements_here)
    assert first["largest"] == second["largest"] == 10
    assert first["total"] == second["total"] == [2.0, 1.0]
    assert first["said"] == second["said"] == "said by 0"
    assert (first["failure"], second["failure"]) == (("ConfigError", 2), ("PeerFailed", 2))
    assert (first["together"], second["together"]) == (0, 1)
    assert first["together", 0] == first["together", 0, 1] == ("ConfigError", 2, "no, says 0")
    assert first["together", 1] == ("RunError", 2, "process 1: no, says 1")
    assert all(second[("together", *failing)][:2] == ("PeerFailed", 2) for failing in ([0], [1], [0, 1]))
    assert first["buffers"] == second["buffers"] == [1.0, 1.0]


def test_a_process_alone_needs_no_group(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with join(None) as processes:
        assert processes == Processes() and not processes.is_distributed and processes.is_main
        assert processes.broadcast_from_main(lambda: 3) == 3 and processes.largest(4, torch.device("cpu")) == 4
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    "left_behind",
    [
        {"RANK": "3"},
        {"WORLD_SIZE": "4"},
        {"WORLD_SIZE": "four"},
        {"RANK": "", "WORLD_SIZE": ""},
        {"RANK": "2", "WORLD_SIZE": "1"},
        {"MASTER_ADDR": "gone.example", "MASTER_PORT": "x", "LOCAL_RANK": "7", "LOCAL_WORLD_SIZE": "0"},
        {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"},
    ],
)
def test_what_a_launcher_left_behind_does_not_disturb_a_process_alone(monkeypatch, left_behind):
    for name, value in left_behind.items():
        monkeypatch.setenv(name, value)
    assert launched() == Processes()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"RANK": "x"}, "RANK: must be a whole number from 0 on, the environment says 'x'"),
        ({"RANK": "-1"}, "RANK: must be a whole number from 0 on, the environment says '-1'"),
        ({"RANK": "4"}, "RANK: must be less than WORLD_SIZE, which is 4, got 4"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE: must be a whole number from 1 on, the environment says '0'"),
        (
            {"MASTER_ADDR": None, "MASTER_PORT": None},
            "4 processes train together, but MASTER_ADDR and MASTER_PORT must",
        ),
        ({"MASTER_PORT": ""}, "4 processes train together, but MASTER_PORT must say where they meet"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT: must be a whole number from 1 to 65535, the environment says '70000'"),
        ({"LOCAL_RANK": "one"}, "LOCAL_RANK: must be a whole number"),
    ],
)
def test_a_contradictory_environment_is_bad_input(runs, monkeypatch, tmp_path, capsys, changed, message):
    right = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in right.items():
        monkeypatch.setenv(name, value)
    assert launched() == Processes(1, 4)
    for name, value in changed.items():
        monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    assert runs.train("--output-dir", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert "start them with torchrun, or unset RANK and WORLD_SIZE" in error or "unset it, or start with" in error
    assert not (tmp_path / "run").exists()


def test_others_that_cannot_be_met(runs, monkeypatch, tmp_path, capsys):
    """The address of an earlier job."""
    monkeypatch.setattr("shike_fast.engine.distributed._TIMEOUT", timedelta(seconds=1))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    left_behind = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    for name, value in left_behind.items():
        monkeypatch.setenv(name, value)
    assert runs.train("--output-dir", tmp_path / "run", "--device", "cpu") == 1
    error = capsys.readouterr().err
    assert f"error: process 1 of 2 (RANK, WORLD_SIZE) cannot meet the others at localhost:{port} (MASTER_ADDR" in error
    assert "or unset RANK and WORLD_SIZE to train in one process" in error


@pytest.mark.parametrize("name", ["TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_RESTART_COUNT"])
def test_numbers_of_restarts_that_are_none(runs, monkeypatch, tmp_path, capsys, name):
    monkeypatch.setenv(name, "many")
    assert runs.train("--output-dir", tmp_path / "run") == 2
    assert f"error: {name}: must be a whole number" in capsys.readouterr().err


def test_every_process_takes_a_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device_of(Processes(3, 4, 1), None) == torch.device("cuda", 1)
    assert choose_device_of(Processes(3, 4, 1), "cuda") == torch.device("cuda", 1)
    assert choose_device_of(Processes(3, 4, 1), "cpu") == torch.device("cpu")
    assert choose_device_of(Processes(), "cuda:1") == torch.device("cuda", 1)
    with pytest.raises(PeerFailed):  # told by the first process of this machine
        choose_device_of(Processes(3, 4, 1), "cuda:7")
    with pytest.raises(ConfigError, match="'cuda:7' is not on this machine"):
        choose_device_of(Processes(2, 4, 0), "cuda:7")
    with pytest.raises(ConfigError, match="4 processes cannot share cuda:0; say --device cuda, and each takes one"):
        choose_device_of(Processes(3, 4, 1), "cuda:0")
    with pytest.raises(
        ConfigError, match="process 2 of this machine has no GPU left, there are 2; start torchrun with"
    ):
        choose_device_of(Processes(2, 4, 2), "cuda")
