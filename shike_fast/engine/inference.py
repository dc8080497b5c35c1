"""The network of a checkpoint, ready to classify."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shike_fast._util.cli import choose_device, use_device
from shike_fast.data import LongTailData
from shike_fast.engine import checkpoint
from shike_fast.engine.config import TrainConfig, replace_settings, stored_config
from shike_fast.engine.exported import exported_weights, read_exported
from shike_fast.engine.foreign import state_of_weights
from shike_fast.engine.precision import make_autocast, settle_amp
from shike_fast.engine.priors import scores_prior
from shike_fast.engine.setup import check_device
from shike_fast.engine.state import check_stage, data_description, model_from_checkpoint, with_average
from shike_fast.engine.trainer import Trainer
from shike_fast.errors import CheckpointError


@dataclass(frozen=True)
class Trained:
    """What a checkpoint holds, on a device.

    Attributes:
        config: the run's settings, with those of the command.
        data: what the checkpoint says of the data set.
        epoch: that it was written after.
        network: ``network(images, stage=classifiers)`` -> logits [K, B, C].
        stage: the stage of the method, counted from 1.
        classifiers: which of the network's it trains.
        scores: logits [K, B, C] -> [B, C], whose softmax are the probabilities.
        scores_prior: the class prior that they are for (:func:`shike_fast.engine.priors.scores_prior`).
        history: metrics of every epoch, where the checkpoint holds them.
        autocast: makes the context around each forward pass.
    """

    config: TrainConfig
    data: dict[str, Any]
    epoch: int
    network: nn.Module
    stage: int
    classifiers: int
    scores: Callable[[Tensor], Tensor]
    scores_prior: str
    history: list[dict[str, Any]]
    device: torch.device
    autocast: Callable[[], AbstractContextManager[object]]

    def prepare_process(self) -> None:
        """What a command does that uses this process for the network alone."""
        torch.set_num_threads(self.config.threads)
        use_device(self.device)


def trained_by(trainer: Trainer) -> Trained:
    """What a finished run has trained."""
    return Trained(
        config=trainer.config,
        data=data_description(trainer.dataset),
        epoch=trainer.epoch,
        network=trainer.tested,
        stage=trainer.stage,
        classifiers=trainer.steps.stage.classifiers,
        scores=trainer.test_setting["scores"],
        scores_prior=scores_prior(trainer.method, trainer.steps.stage, trainer.config.sampler),
        history=trainer.history,
        device=trainer.device,
        autocast=trainer.steps.autocast,
    )


def read_state(source: Path, dataset: LongTailData | None = None) -> dict[str, Any]:
    """What a file says of a trained network, as a checkpoint says it, without the state of the run.

    Args:
        source: a checkpoint, weights that ``shike_fast.export`` wrote or their folder, or weights of elsewhere.
        dataset: what weights of elsewhere are used on.

    Raises:
        CheckpointError: the file is none of these, or says itself which data set it is of.
    """
    found = exported_weights(source)
    if found is not None:
        state = read_exported(found)
    else:
        try:
            state = checkpoint.load_checkpoint(source)
        except CheckpointError as error:
            elsewhere = state_of_weights(source, dataset, error)
            if elsewhere is None:
                raise
            return elsewhere
    if dataset is not None:
        raise CheckpointError(f"--dataset: checkpoint {source} says itself what it was trained on; leave it out")
    return state


def load_trained(
    source: Path, stage: int | None, settings: dict[str, Any], dataset: LongTailData | None = None
) -> Trained:
    """A trained network from a file.

    Args:
        source: as for :func:`read_state`.
        stage: of the method; None for the one that the checkpoint was training.
        settings: of this command: ``device``, ``amp``, ``threads`` and whichever others; None leaves the run's.
        dataset: what weights of elsewhere are used on.

    Raises:
        CheckpointError: if the file or the stage cannot be used.
        ConfigError: if a setting cannot.
    """
    return trained_from(read_state(source, dataset), source, stage, settings)


def trained_from(state: dict[str, Any], source: Path, stage: int | None, settings: dict[str, Any]) -> Trained:
    """A trained network from what :func:`read_state` read; the other arguments are those of :func:`load_trained`."""
    device = choose_device(settings["device"])
    amp, note = settle_amp(settings["amp"] or state["config"].get("amp"), device)
    given = {name: value for name, value in (settings | {"amp": amp}).items() if value is not None}
    given |= {"loader": "auto", "cuda_graph": None}  # the run's may need a device that is not here
    config = replace_settings(stored_config(state["config"], str(source)), given)
    if note is not None:
        print(note, file=sys.stderr)
    check_device(config, device)
    if config.ema:
        state = with_average(state, source)
    model = model_from_checkpoint(state, source, config).to(device)
    method = config.create_method(state["data"]["class_counts"].to(device))
    number = stage or state["stage"]
    check_stage(method, number, source)
    network = method.evaluated(model)
    try:
        method.load_state(state.get("method_state", {}))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"checkpoint {source}: its method's state does not fit: {error}") from error
    chosen = method.stages[number - 1]
    return Trained(
        config=config,
        data=state["data"],
        epoch=state["epoch"],
        network=network,
        stage=number,
        classifiers=chosen.classifiers,
        scores=functools.partial(method.scores, stage=chosen),
        scores_prior=scores_prior(method, chosen, config.sampler),
        history=state.get("history", []),
        device=device,
        autocast=make_autocast(config.amp, device),
    )
