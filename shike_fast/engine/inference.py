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
from shike_fast.engine import checkpoint
from shike_fast.engine.config import TrainConfig, replace_settings, stored_config
from shike_fast.engine.precision import make_autocast, settle_amp
from shike_fast.engine.priors import scores_prior
from shike_fast.engine.setup import check_device
from shike_fast.engine.state import check_stage, model_from_checkpoint, with_average
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


def load_trained(source: Path, stage: int | None, settings: dict[str, Any]) -> Trained:
    """Read a checkpoint and prepare this process for its network.

    Args:
        source: the checkpoint file.
        stage: of the method; None for the one that the checkpoint was training.
        settings: of this command: ``device``, ``amp``, ``threads`` and whichever others; None leaves the run's.

    Raises:
        CheckpointError: if the file or the stage cannot be used.
        ConfigError: if a setting cannot.
    """
    state = checkpoint.load_checkpoint(source)
    device = choose_device(settings["device"])
    amp, note = settle_amp(settings["amp"] or state["config"].get("amp"), device)
    given = {name: value for name, value in (settings | {"amp": amp}).items() if value is not None}
    given |= {"loader": "auto", "cuda_graph": None}  # the run's may need a device that is not here
    config = replace_settings(stored_config(state["config"], str(source)), given)
    if note is not None:
        print(note, file=sys.stderr)
    torch.set_num_threads(config.threads)
    use_device(device)
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
