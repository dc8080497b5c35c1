"""How the epochs of a run are shared out: the lengths of its stages, and the steps of its learning rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shike_fast.engine.schedule import PUBLISHED_EPOCHS, PUBLISHED_STEPS, scaled_steps
from shike_fast.errors import ConfigError
from shike_fast.methods import Method, Stage


def stage_epochs(stages: Sequence[Stage], settings: Mapping[str, Any]) -> tuple[int, ...]:
    """The number of epochs of each stage."""

    def length(stage: Stage) -> int | None:
        if isinstance(stage.epochs, float):
            return round(stage.epochs * settings["epochs"])
        return None if stage.epochs is None else settings[stage.epochs]

    lengths = list(map(length, stages))
    rest = settings["epochs"] - sum(length for length in lengths if length is not None)
    return tuple(rest if length is None else length for length in lengths)


def open_stage_epochs(stages: Sequence[Stage], settings: Mapping[str, Any]) -> int:
    """The number of epochs of the stage that gets those that the others leave."""
    pairs = zip(stages, stage_epochs(stages, settings), strict=True)
    return next(length for stage, length in pairs if stage.epochs is None)


def split_epochs(values: dict[str, Any], given: dict[str, Any], usual: dict[str, Any], method: type[Method]) -> None:
    """Choose the lengths of stages where only the total was given: their usual share of it, at least one epoch."""
    named = [stage.epochs for stage in method.stages if isinstance(stage.epochs, str)]
    if "stage2_epochs" not in named:
        if given.get("stage2_epochs", 0) != 0:
            raise ConfigError(
                f"--stage2-epochs: method '{method.name}' has no second stage, got {given['stage2_epochs']}"
            )
        values["stage2_epochs"] = 0
    if "epochs" not in given:
        return
    left = values["epochs"] - 1 - sum(given.get(name, 0) for name in named)  # one for the stage that gets the rest
    for name in named:
        if name not in given:
            share = usual[name] / usual["epochs"]
            values[name] = max(0, min(max(1, round(values["epochs"] * share)), left))
            left -= values[name]


def place_steps(values: dict[str, Any], given: dict[str, Any], usual: dict[str, Any], method: type[Method]) -> None:
    """Choose the steps of the learning rate where they were not given: their usual shares of the stage."""
    if given.get("step_epochs") is not None:
        return
    values["step_epochs"] = None
    if any((stage.schedule or values["schedule"]) == "step" for stage in method.stages):
        steps, of = PUBLISHED_STEPS, PUBLISHED_EPOCHS
        if usual["step_epochs"] is not None:
            steps, of = usual["step_epochs"], open_stage_epochs(method.stages, usual)
        values["step_epochs"] = scaled_steps(steps, open_stage_epochs(method.stages, values), of=of)
