"""Train a multi-expert network on a long-tailed data set: ``python -m shike_fast.train --dataset NAME``.

Exit status: 0 finished, 1 training failed, 2 bad input (nothing was written), 128 + N stopped and saved on signal N.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from shike_fast import data
from shike_fast._util.cli import (
    ArgumentParser,
    check_workers,
    choose_device,
    make_deterministic,
    run_command,
    told_once,
    use_device,
)
from shike_fast._util.plugins import load_plugins
from shike_fast.engine import checkpoint, distributed, rundir
from shike_fast.engine.config import TrainConfig, recipe_settings, resolve, resume_config
from shike_fast.engine.config_file import settings_from
from shike_fast.engine.options import MUST as _MUST
from shike_fast.engine.options import add_options
from shike_fast.engine.precision import AUTO, settle_amp
from shike_fast.engine.setup import check_device
from shike_fast.engine.state import load_data
from shike_fast.engine.trainer import Interrupted, NonFiniteLossError, Trainer
from shike_fast.errors import ConfigError, warn
from shike_fast.models.pretrained import require_weight_file

_AUTO = "auto"


def make_parser() -> ArgumentParser:
    """The command line of ``shike_fast.train``; a setting that is not given does not appear in the parsed namespace."""
    parser = ArgumentParser(
        prog="python -m shike_fast.train",
        description=__doc__,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_recipe_table(),
    )
    add_options(parser)
    return parser


def _recipe_table() -> str:
    lines = ["defaults by data set:", f"  {'':18}model     epochs  batch  lr    weight decay  alpha  beta  scale"]
    for name, info in data.datasets().items():
        recipe = recipe_settings(info)
        epochs = f"{recipe['epochs'] - recipe['stage2_epochs']}+{recipe['stage2_epochs']}"
        lines.append(
            f"  {name:18}{recipe['model']:10}{epochs:8}{recipe['batch_size']:<7}{recipe['lr']:<6g}"
            f"{recipe['weight_decay']:<14g}{recipe['hardest_weight']:<7g}{recipe['mutual_weight']:<6g}{recipe['scale']:g}"
        )
    lines.append("your own data set: those of imagefolder, or, where its images have one size, of cifar100-lt")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return run_command(lambda: _train(_given(argv)), prints_result=False)


def _given(argv: Sequence[str] | None) -> dict[str, Any]:
    """What the command line says, and what the file of ``--config`` does."""
    with told_once():
        plugins = load_plugins(argv)
        given = vars(make_parser().parse_args(argv)) | ({"plugins": plugins} if plugins else {})
        file: Path | None = given.pop("config", None)
        return given if file is None else settings_from(file, given)


@dataclass(frozen=True)
class _Plan:
    """What the first process found out for all: the run to begin or to go on with."""

    config: TrainConfig
    output_dir: Path
    state: dict[str, Any] | None = None
    best_file: Path | None = None
    new_directory: bool = True
    note: str | None = None
    source: Path = Path(checkpoint.LAST)


def _train(given: dict[str, Any]) -> int:
    profile: bool = given.pop("profile", False)
    try:
        with distributed.join(given.get("device")) as processes:
            return _train_together(given, processes, profile)
    except distributed.FailedElsewhere as failure:
        return failure.exit_status


def _train_together(given: dict[str, Any], processes: distributed.Processes, profile: bool) -> int:
    with contextlib.ExitStack() as held:
        plan = processes.from_first(lambda: _with_note(_plan(given, held), given))
        trainer = _prepare(plan, processes, profile)  # whatever is wrong with the input shows before the directory
        processes.from_first(lambda: _take_directory(plan, held))
        return _run(trainer, plan.note)


def _plan(given: dict[str, Any], held: contextlib.ExitStack) -> _Plan:
    """Settings, directory and checkpoint; ``held`` keeps the directory of a run that goes on."""
    check_workers(given.get("workers"))
    resume: str | None = given.pop("resume", None)
    output_dir: Path | None = given.pop("output_dir", None)
    if distributed.may_restart() and output_dir is None:
        raise ConfigError(
            "--output-dir: name it, so that processes that torchrun restarts find what they had saved; without "
            "torchrun, unset TORCHELASTIC_MAX_RESTARTS"
        )
    if _goes_on(output_dir):
        resume = _AUTO
    if resume is None:
        config = resolve(given)
        return _new(config, output_dir or rundir.default_directory(config.dataset, config.method))
    if resume not in (_AUTO, _MUST):
        source = Path(resume)
        own = source.name in (checkpoint.LAST, checkpoint.previous_of(Path(checkpoint.LAST)).name)
        output_dir = output_dir or source.parent
        if not (own and source.is_file() and output_dir.resolve() == source.parent.resolve()):
            state = checkpoint.load_checkpoint(source, to_resume=True)
            config = resume_config(state["config"], given, str(source))
            return _new(config, output_dir, state, source)
    elif output_dir is None:
        raise ConfigError("--resume: say which run with --output-dir DIR, or name its checkpoint: --resume FILE")
    elif not checkpoint.has_checkpoint(output_dir):
        if resume == _MUST:
            raise ConfigError(
                f"--resume: {output_dir} holds no checkpoint; leave --resume out or use --resume auto to start there"
            )
        return _new(resolve(given), output_dir)
    # before reading: another process may still be writing
    held.enter_context(rundir.open_directory(output_dir))
    if resume in (_AUTO, _MUST):
        source, state = _newest_state(output_dir)
    else:
        source, state = Path(resume), checkpoint.load_checkpoint(Path(resume), to_resume=True)
    config = resume_config(state["config"], given, str(source))
    return _Plan(config, output_dir, state, new_directory=False, source=source)


def _with_note(plan: _Plan, given: dict[str, Any]) -> _Plan:
    """The plan with what there is to say of its precision."""
    amp = AUTO if given.get("amp") == AUTO and plan.state is None else plan.config.amp
    return replace(plan, note=settle_amp(amp, choose_device(plan.config.device))[1])


def _goes_on(output_dir: Path | None) -> bool:
    """Whether torchrun starts these processes anew after they had begun, and saved, the run in the directory.

    Where they never came so far, all is as at their first start: the same run, or the same refusal.
    """
    if output_dir is None or not distributed.restarted() or not checkpoint.has_checkpoint(output_dir):
        return False
    return rundir.signed_by(output_dir) == distributed.launch()


def _new(
    config: TrainConfig, output_dir: Path, state: dict[str, Any] | None = None, source: Path | None = None
) -> _Plan:
    rundir.check_unused(output_dir)
    if state is None and config.pretrained is not None:
        require_weight_file(Path(config.pretrained))
    if source is None:
        return _Plan(config, output_dir)
    return _Plan(config, output_dir, state, source.with_name(checkpoint.BEST), source=source)


def _take_directory(plan: _Plan, held: contextlib.ExitStack) -> None:
    if plan.new_directory:
        held.enter_context(rundir.open_directory(plan.output_dir))
        rundir.check_unused(plan.output_dir)  # nobody else began there meanwhile
    rundir.sign(plan.output_dir, distributed.launch())
    checkpoint.remove_leftovers(plan.output_dir)


def _prepare(plan: _Plan, processes: distributed.Processes, profile: bool) -> Trainer:
    config = plan.config
    make_deterministic(config.deterministic)
    torch.set_num_threads(config.threads)
    device = distributed.choose_device_of(processes, config.device)
    use_device(device)
    processes.together(lambda: check_device(config, device))
    if config.download:
        processes.from_first(lambda: load_data(config).name)  # it alone downloads to a folder that all share
    dataset = processes.together(lambda: load_data(config))
    fingerprint = processes.from_first(lambda: dataset.fingerprint)
    processes.together(lambda: _require_same(dataset, fingerprint))
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
    )


def _require_same(dataset: data.LongTailData, fingerprint: str) -> None:
    if dataset.fingerprint != fingerprint:
        raise ConfigError(f"--data-dir: this process sees another {dataset.name} than the first one")


def _run(trainer: Trainer, note: str | None) -> int:
    trainer.console.note(_headline(trainer))
    if note is not None:
        trainer.console.note(note)
    try:
        trainer.run()
    except (Interrupted, NonFiniteLossError) as end:  # in all processes at once
        if not trainer.processes.first:
            raise distributed.FailedElsewhere(str(end), end.exit_status) from end
        if isinstance(end, NonFiniteLossError):
            raise
        print(end, file=sys.stderr)
        return end.exit_status
    return 0


def _newest_state(output_dir: Path) -> tuple[Path, dict[str, Any]]:
    found = checkpoint.find_resumable(output_dir, warn)
    if found is None:
        raise ConfigError(f"--resume: the checkpoint in {output_dir} has gone")
    return found


def _headline(trainer: Trainer) -> str:
    config, dataset = trainer.config, trainer.dataset
    counts = dataset.class_counts
    processes = trainer.processes.world_size
    where = f"{processes} processes on {trainer.device.type}" if processes > 1 else str(trainer.device)
    going_on = f", going on after epoch {trainer.epoch}" if trainer.epoch else ""
    return (
        f"{config.dataset}: {int(counts.sum()):,} training images, {dataset.num_classes} classes "
        f"of {int(counts.max())} to {int(counts.min())}, {len(dataset.test):,} test images\n"
        f"{config.method}, {config.model}, {config.num_experts} expert{'s' if config.num_experts > 1 else ''}, "
        f"{config.shown_epochs} epochs, {where}, seed {config.seed}{going_on}\n"
        f"writing to {trainer.output_dir}"
    )


if __name__ == "__main__":
    sys.exit(main())
