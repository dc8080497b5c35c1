"""A run from the command line's settings to its exit status: what to begin, resume or refuse, and then training."""

from __future__ import annotations

import contextlib
import enum
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from shike_fast import data, ops
from shike_fast._util.cli import check_workers, choose_device, make_deterministic, use_device
from shike_fast.engine import checkpoint, distributed, rundir
from shike_fast.engine.config import TrainConfig, resolve, resume_config
from shike_fast.engine.console import RunConsole
from shike_fast.engine.finetuning import random_trunk_note
from shike_fast.engine.precision import AUTO, settle_amp
from shike_fast.engine.setup import check_device
from shike_fast.engine.signals import Interrupted
from shike_fast.engine.state import load_data, normalisation_note
from shike_fast.engine.trainer import NonFiniteLossError, Trainer
from shike_fast.errors import ConfigError, warn
from shike_fast.models.weights import require_weight_file


class Asked(enum.Enum):
    """What the command line asks for."""

    NEW = "no --resume"
    RESUME = "--resume"
    AUTO = "--resume auto"
    FILE = "--resume FILE"
    RESTART = "torchrun restarts the processes that had saved the run in the directory"


class Found(enum.Enum):
    """What is there."""

    UNNAMED = "no directory is named"
    NOTHING = "the directory holds no checkpoint; of FILE: it is not the checkpoint of the run in the directory"
    RUN = "the directory holds a checkpoint; of FILE: it is that checkpoint"


class Action(enum.Enum):
    """What happens."""

    BEGIN = "a new run, in a directory that is not in use"
    RESUME = "resume the run in the directory"
    BRANCH = "resume the run of FILE in another directory, which is not in use"


WHICH = "--resume: say which run with --output-dir DIR, or name its checkpoint: --resume FILE"
EMPTY = "--resume: {directory} holds no checkpoint; leave --resume out or use --resume auto to start there"
_DECISIONS: dict[tuple[Asked, Found], Action | str] = {  # a sentence refuses
    (Asked.NEW, Found.UNNAMED): Action.BEGIN,
    (Asked.NEW, Found.NOTHING): Action.BEGIN,
    (Asked.NEW, Found.RUN): Action.BEGIN,  # which refuses the directory, as it is in use
    (Asked.RESUME, Found.UNNAMED): WHICH,
    (Asked.RESUME, Found.NOTHING): EMPTY,
    (Asked.RESUME, Found.RUN): Action.RESUME,
    (Asked.AUTO, Found.UNNAMED): WHICH,
    (Asked.AUTO, Found.NOTHING): Action.BEGIN,
    (Asked.AUTO, Found.RUN): Action.RESUME,
    (Asked.FILE, Found.NOTHING): Action.BRANCH,
    (Asked.FILE, Found.RUN): Action.RESUME,
    (Asked.RESTART, Found.RUN): Action.RESUME,
}


@dataclass(frozen=True)
class Plan:
    """What process 0 decided for all: the run to begin, to resume or to branch off."""

    config: TrainConfig
    output_dir: Path
    state: dict[str, Any] | None = None
    best_file: Path | None = None
    new_directory: bool = True
    note: str | None = None
    source: Path = Path(checkpoint.LAST)


def run(given: dict[str, Any]) -> int:
    """Train as the parsed command line says, in all processes; returns the exit status.

    Args:
        given: the settings that the user gave, with ``output_dir``, ``resume`` (True without a value) and ``profile``.
    """
    try:
        with distributed.join(given.get("device")) as processes:
            return train_one(given, processes)
    except distributed.PeerFailed as failure:
        return failure.exit_status


def train_one(given: dict[str, Any], processes: distributed.Processes, *, more: bool = False) -> int:
    """One run of processes that have joined; its arguments and result are those of :func:`run`.

    Args:
        given: the settings, changed here.
        processes: who trains along.
        more: another run is to follow: a signal that came after the last step is the exit status, for it was meant to
            stop that as well.

    Raises:
        PeerFailed: in all processes but the first one, where the run ends early.
    """
    try:
        trainer = train(given, processes)
    except Interrupted as end:
        print(end, file=sys.stderr)
        return end.exit_status
    return 128 + trainer.late_signal if more and trainer.late_signal else 0


def train(given: dict[str, Any], processes: distributed.Processes, *, quiet: bool = False) -> Trainer:
    """Train one run to its end; returns what trained it.

    Args:
        given: as for :func:`train_one`.
        processes: who trains along.
        quiet: print nothing.

    Raises:
        Interrupted, NonFiniteLossError: in the first process.
        PeerFailed: in all others, where the run ends early.
    """
    profile: bool = given.pop("profile", False)
    with contextlib.ExitStack() as held:
        plan = processes.broadcast_from_main(lambda: _with_note(make_plan(given, held), given))
        # Whatever is wrong with the input shows before the directory is taken.
        trainer = _prepare(plan, processes, profile, quiet)
        processes.broadcast_from_main(lambda: _take_directory(plan, held))
        notes = [
            _headline(trainer),
            plan.note,
            normalisation_note(trainer.config, trainer.dataset, trainer.model),
            None if trainer.cache is None else trainer.cache.note,
        ]
        for note in notes:
            if note is not None:
                trainer.console.note(note)
        try:
            trainer.run()
        except (Interrupted, NonFiniteLossError) as end:  # in all processes at once
            if not processes.is_main:
                raise distributed.PeerFailed(str(end), end.exit_status) from end
            raise
        return trainer


def make_plan(given: dict[str, Any], held: contextlib.ExitStack) -> Plan:
    """Settings, directory and checkpoint; ``held`` keeps the directory of a resumed run.

    Raises:
        ConfigError: the settings are wrong, or ask for what is not there.
        CheckpointError: the checkpoint cannot be read.
    """
    check_workers(given.get("workers"))
    resume: str | bool | None = given.pop("resume", None)
    directory: Path | None = given.pop("output_dir", None)
    require_named(directory)
    asked = _asked(resume, directory)
    file = Path(str(resume)) if asked is Asked.FILE else None
    if file is not None:
        directory = directory or file.parent
    decision = _DECISIONS[asked, _found(directory, file)]
    if isinstance(decision, str):
        raise ConfigError(decision.format(directory=directory))
    if directory is None or decision is Action.BEGIN:
        return _begin(resolve(given), directory)
    if file is not None and decision is Action.BRANCH:
        return _branch(given, directory, file)
    return _resume(given, directory, file, held)


def require_named(directory: Path | None) -> None:
    """Refuse a run without ``--output-dir`` where ``torchrun`` may restart its processes.

    Raises:
        ConfigError: saying so.
    """
    if distributed.may_restart() and directory is None:
        raise ConfigError(
            "--output-dir: name it, so that processes that torchrun restarts find what they had saved; without "
            "torchrun, unset TORCHELASTIC_MAX_RESTARTS"
        )


def _asked(resume: str | bool | None, directory: Path | None) -> Asked:
    if directory is not None and saved_by_this_launch(directory):
        return Asked.RESTART
    if resume is None:
        return Asked.NEW
    if resume is True:
        return Asked.RESUME
    return Asked.AUTO if resume == "auto" else Asked.FILE


def saved_by_this_launch(directory: Path) -> bool:
    """Whether torchrun restarts these processes after they had begun, and saved, the run in the directory.

    If they had not come so far, a restart is like the first start: the same run, or the same refusal.
    """
    if not distributed.restarted() or not checkpoint.has_checkpoint(directory):
        return False
    return rundir.signed_by(directory) == distributed.launch()


def _found(directory: Path | None, file: Path | None) -> Found:
    if directory is None:
        return Found.UNNAMED
    if file is None:
        return Found.RUN if checkpoint.has_checkpoint(directory) else Found.NOTHING
    own = file.name in (checkpoint.LAST, checkpoint.previous_of(Path(checkpoint.LAST)).name)
    there = own and file.is_file() and directory.resolve() == file.parent.resolve()
    return Found.RUN if there else Found.NOTHING


def _begin(config: TrainConfig, directory: Path | None) -> Plan:
    directory = directory or rundir.default_directory(config.dataset, config.method)
    rundir.check_unused(directory)
    if config.pretrained is not None:
        require_weight_file(Path(config.pretrained))
    return Plan(config, directory)


def _branch(given: dict[str, Any], directory: Path, file: Path) -> Plan:
    state = checkpoint.load_checkpoint(file, to_resume=True)
    config = resume_config(state["config"], given, str(file))
    rundir.check_unused(directory)
    return Plan(config, directory, state, file.with_name(checkpoint.BEST), source=file)


def _resume(given: dict[str, Any], directory: Path, file: Path | None, held: contextlib.ExitStack) -> Plan:
    held.enter_context(rundir.open_directory(directory))  # before reading: another process may still be writing
    if file is None:
        found = checkpoint.find_resumable(directory, warn)
        if found is None:
            raise ConfigError(f"--resume: the checkpoint in {directory} has gone")
        file, state = found
    else:
        state = checkpoint.load_checkpoint(file, to_resume=True)
    config = resume_config(state["config"], given, str(file))
    return Plan(config, directory, state, new_directory=False, source=file)


def _with_note(plan: Plan, given: dict[str, Any]) -> Plan:
    """The plan with what there is to say of its precision, and of a new run's weights."""
    amp = AUTO if given.get("amp") == AUTO and plan.state is None else plan.config.amp
    notes = [
        settle_amp(amp, choose_device(plan.config.device))[1],
        random_trunk_note(plan.config) if plan.state is None else None,
    ]
    return replace(plan, note="\n".join(note for note in notes if note is not None) or None)


def _prepare(plan: Plan, processes: distributed.Processes, profile: bool, quiet: bool) -> Trainer:
    config = plan.config
    make_deterministic(config.deterministic)
    torch.set_num_threads(config.threads)
    device = distributed.choose_device_of(processes, config.device)
    use_device(device)
    processes.run_on_all(lambda: check_device(config, device))
    if ops.needs_verification(device):
        ops.verify(device)  # of several processes on one machine the others wait for the first
    if config.download:
        processes.broadcast_from_main(lambda: load_data(config).name)  # it alone downloads to a folder that all share
    dataset = processes.run_on_all(lambda: load_data(config))
    fingerprint = processes.broadcast_from_main(lambda: dataset.fingerprint)
    processes.run_on_all(lambda: _require_same(dataset, fingerprint))
    return Trainer(
        config,
        dataset,
        plan.output_dir,
        device=device,
        state=plan.state,
        best_file=plan.best_file,
        processes=processes,
        profile=profile,
        source=plan.source,
        console=RunConsole(config.epochs, 1, quiet=True) if quiet else None,
    )


def _require_same(dataset: data.LongTailData, fingerprint: str) -> None:
    if dataset.fingerprint != fingerprint:
        raise ConfigError(f"--data-dir: this process sees another {dataset.name} than the first one")


def _take_directory(plan: Plan, held: contextlib.ExitStack) -> None:
    if plan.new_directory:
        held.enter_context(rundir.open_directory(plan.output_dir))
        rundir.check_unused(plan.output_dir)  # no other process began there meanwhile
    rundir.sign(plan.output_dir, distributed.launch())
    checkpoint.remove_leftovers(plan.output_dir)


def _headline(trainer: Trainer) -> str:
    config, dataset = trainer.config, trainer.dataset
    counts = dataset.class_counts
    processes = trainer.processes.world_size
    where = f"{processes} processes on {trainer.device.type}" if processes > 1 else str(trainer.device)
    going_on = f", going on after epoch {trainer.epoch}" if trainer.epoch else ""
    notes = "".join(f"{note}\n" for note in dataset.notes)
    if dataset.validation is not None:
        notes += f"{dataset.validation.sentence}, named in {rundir.VALIDATION}\n"
    return (
        f"{config.dataset}: {int(counts.sum()):,} training images, {dataset.num_classes} classes "
        f"of {int(counts.max())} to {int(counts.min())}, {len(dataset.test):,} test images\n"
        f"{notes}"
        f"{config.method}, {config.model}, {config.num_experts} expert{'s' if config.num_experts > 1 else ''}, "
        f"{config.shown_epochs} epochs, {where}, seed {config.seed}{going_on}\n"
        f"{_kernels(trainer.device)}\n"
        f"writing to {trainer.output_dir}"
    )


def _kernels(device: torch.device) -> str:
    """One line where all operators run on one backend, else a line each."""
    lines = ops.what_runs(device)
    backends = {line.split(": ")[1].split(" ")[0] for line in lines}
    if len(backends) > 1 or backends == {"reference"}:
        return "\n".join(lines)
    return f"kernels: {backends.pop()} (verified on this {'GPU' if device.type == 'cuda' else 'CPU'})"
