"""``--checkpoint-activations``: the same run with less memory, in several processes too."""

import dataclasses

import pytest
import torch
import torch.distributed as dist

from shike_fast import models
from shike_fast.engine.config import CHANGEABLE, resolve, resume_config
from shike_fast.engine.distributed import Processes
from shike_fast.engine.setup import records
from shike_fast.engine.state import load_data
from shike_fast.engine.steps import StageSteps
from shike_fast.engine.totals import Totals
from shike_fast.errors import ConfigError
from shike_fast.models import recompute
from shike_fast.nn import convert_sync_batchnorm


@pytest.fixture
def recomputations(monkeypatch):
    calls = []
    plain = recompute.checkpoint
    monkeypatch.setattr(recompute, "checkpoint", lambda *args, **options: calls.append(0) or plain(*args, **options))
    return calls


def test_the_run_is_the_same_bit_for_bit(runs, tmp_path, finished, recomputations):
    assert runs.train(*runs.small, "--checkpoint-activations", "--output-dir", tmp_path / "run") == 0
    assert len(recomputations) == 2 * 6 * 6  # stem, two blocks and three experts; two epochs of stage 1 of six steps
    runs.assert_same_weights(finished / "last.pt", tmp_path / "run" / "last.pt")
    assert runs.reproducible_metrics(finished) == runs.reproducible_metrics(tmp_path / "run")


def test_a_resumed_run_may_begin_with_it():
    stored = dataclasses.asdict(resolve({}))
    assert "checkpoint_activations" in CHANGEABLE
    assert resume_config(stored, {"checkpoint_activations": True}, "last.pt").checkpoint_activations


def test_such_a_step_is_not_recorded():
    dataset = dataclasses.replace(load_data(resolve({})), image_size=32)
    gpu = torch.device("cuda", 0)
    assert records(resolve({}), dataset, gpu, Processes())
    assert not records(resolve({"checkpoint_activations": True}), dataset, gpu, Processes())
    with pytest.raises(ConfigError, match=r"--cuda-graph: does not record .* use --no-cuda-graph"):
        resolve({"checkpoint_activations": True, "cuda_graph": True})


def steps_here():
    """Weights and statistics after three steps of each stage with and without, and what the option stored."""
    processes = Processes(dist.get_rank(), dist.get_world_size())
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = convert_sync_batchnorm(models.create_model("resnet8", num_classes=5)).train()
        settings = {"batch_size": 8, "epochs": 2, "accumulate": 2, "checkpoint_activations": checkpointing}
        for stage in (1, 2):
            steps = StageSteps(
                model,
                resolve(settings),
                stage,
                class_counts=torch.arange(1, 6),
                processes=processes,
                totals=Totals(torch.device("cpu")),
            )
            assert model.checkpoint_activations is checkpointing
            for group in steps.optimizer.param_groups:
                group["lr"] = 0.01
            for _ in range(3):
                steps(torch.randn(4, 3, 16, 16), torch.randint(5, (4,)), 8)
        results.append(model.state_dict())
    return results


@pytest.mark.slow
def test_two_processes_make_the_same_steps(two_processes):
    for plain, checkpointed in two_processes(steps_here):
        assert plain.keys() == checkpointed.keys()
        assert not [name for name in plain if not torch.equal(plain[name], checkpointed[name])]
