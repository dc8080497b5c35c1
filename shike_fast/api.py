"""Training and using networks from Python: :func:`train` and :func:`load`, which ``shike_fast`` offers as its own.

Errors are exceptions here: :class:`~shike_fast.errors.ShikeError`, whose subclasses say what kind. What a run sets for
the whole process (threads, signal handlers, random numbers) is as before when it ends.
"""

from __future__ import annotations

import os
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shike_fast._util.cli import settings_kept
from shike_fast._util.plugins import import_plugins
from shike_fast.data import LongTailData
from shike_fast.data.registry import passed_on
from shike_fast.engine import distributed
from shike_fast.engine.classifier import Classifier, ImageClassifier
from shike_fast.engine.config_file import named_settings, settings_from
from shike_fast.engine.inference import load_trained, trained_by
from shike_fast.engine.programs import ONNX, TORCH, load_program
from shike_fast.engine.run import train as train_run
from shike_fast.engine.signals import Interrupted
from shike_fast.errors import ConfigError

_one_at_a_time = threading.Lock()


class RunInterrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM stopped a run, whose state is saved: :func:`train` with ``resume=True`` resumes it."""


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        directory: where its files are.
        history: the metrics of every epoch, as in ``metrics.jsonl``.
        best: those of the epoch with the highest ``top1``, whose network is in ``best.pt``.
        model: the network after the last epoch, ready to classify.
        config: every setting by name.
        dataset: what it was trained on.
    """

    directory: Path
    history: list[dict[str, Any]]
    best: dict[str, Any] | None
    model: Classifier
    config: dict[str, Any]
    dataset: LongTailData

    def __repr__(self) -> str:
        last = f", top1={self.metrics['top1']:.2f}" if self.history else ""
        return f"Run({str(self.directory)!r}, {self.dataset.name!r}, {self.config['method']!r}{last})"

    @property
    def metrics(self) -> dict[str, Any]:
        """The metrics of the last epoch: ``top1``, ``many``, ``medium``, ``few``, ``train_loss`` and others."""
        return self.history[-1]


def train(
    dataset: str | LongTailData | None = None,
    method: str | None = None,
    *,
    output_dir: str | os.PathLike[str] | None = None,
    resume: bool | str | os.PathLike[str] | None = None,
    config: str | os.PathLike[str] | None = None,
    plugins: tuple[str, ...] = (),
    quiet: bool = False,
    **options: Any,
) -> Run:
    """Train a network, as ``python -m shike_fast.train`` does.

        run = shike_fast.train(dataset="digits-lt", method="shike", epochs=2)
        run.metrics["top1"], run.directory, run.model.predict("digit.png").names

    Args:
        dataset: a name, or a data set from :func:`shike_fast.data.from_dataset` or ``load_dataset``. Default
            ``digits-lt``, and for a resumed run its own; one that was passed as an object has to be passed again.
        method: a name; default ``shike``.
        output_dir: directory of the run; default one below ``runs/`` that names the run and the time.
        resume: True resumes the run in ``output_dir``; "auto" does so if there is one; a path resumes from that file.
        config: a file of settings, such as ``config.json`` of another run.
        plugins: modules to import first, as ``--plugin`` does.
        quiet: print nothing but warnings.
        options: every other option of the command by its name, such as ``epochs=100, lr=0.1, data_dir="~/data"``.

    Returns:
        The finished run.

    Raises:
        ConfigError, DataError, CheckpointError: an argument, the data or a file cannot be used.
        RunError: the run could not be finished.
        RunInterrupted: it was stopped by a signal. It is a ``KeyboardInterrupt``.
    """
    plugins = import_plugins(plugins)
    if "seeds" in options:
        raise ConfigError("seeds: belongs to the command; here a loop over seed=0, 1, ... trains a run each")
    profile = {name: options.pop(name) for name in ("profile",) if name in options}
    given = {name: _plain(value) for name, value in named_settings(options).items()}
    named = {"method": method, "plugins": plugins or None}
    given |= {name: value for name, value in named.items() if value is not None}
    given |= {"dataset": dataset} if isinstance(dataset, str) else {}
    passed = dataset if isinstance(dataset, LongTailData) else None
    if dataset is not None and passed is None and not isinstance(dataset, str):
        raise ConfigError(
            f"dataset: must be a name, or what data.load_dataset or data.from_dataset returns, got "
            f"{type(dataset).__name__}; data.from_dataset takes a data set of PyTorch"
        )
    if passed is not None:
        given |= _settings_of(passed, given)
    if config is not None:
        given = settings_from(Path(config), given)
    given |= profile
    if output_dir is not None:
        given["output_dir"] = Path(output_dir)
    if resume is not None and resume is not False:
        given["resume"] = resume if resume is True else os.fspath(resume)
    if not _one_at_a_time.acquire(blocking=False):
        raise ConfigError("train: another run is under way in this process; wait for its end, or use a process each")
    try:
        with settings_kept(), passed_on(passed):
            return _train(given, quiet)
    finally:
        _one_at_a_time.release()


def _plain(value: Any) -> Any:
    """A path as text, a number of NumPy as one of Python."""
    return (
        os.fspath(value) if isinstance(value, os.PathLike) else value.item() if isinstance(value, np.generic) else value
    )


def _settings_of(dataset: LongTailData, given: dict[str, Any]) -> dict[str, Any]:
    """What a data set that is passed settles, so that the run's settings tell the truth.

    Raises:
        ConfigError: an option says how to load what is loaded already.
    """
    settled = {
        "dataset": dataset.name,
        "imbalance_factor": dataset.imbalance_factor,
        "augmentation": dataset.augmentation,
        "image_size": dataset.image_size if dataset.info is not None and dataset.info.resizable else None,
        "val_share": None if dataset.validation is None else dataset.validation.share,
        "split_seed": None if dataset.validation is None else dataset.validation.seed,
    }
    loading = {*settled, "data_dir", "download", "long_tail", "subset", "strict"} & given.keys()
    if loading:
        raise ConfigError(
            f"{', '.join(sorted(loading))}: says how a data set is loaded, but {dataset.name} is passed as an object; "
            "give this to what made it"
        )
    return {name: value for name, value in settled.items() if value is not None}


def _train(given: dict[str, Any], quiet: bool) -> Run:
    with distributed.join(given.get("device")) as processes:
        try:
            trainer = train_run(given, processes, quiet=quiet)
        except Interrupted as end:
            raise RunInterrupted(str(end)) from end
        trained = trained_by(trainer)
        return Run(
            directory=trainer.output_dir,
            history=trainer.history,
            best=trainer.best,
            model=Classifier(trained, trainer.output_dir),
            config=asdict(trainer.config),
            dataset=trainer.dataset,
        )


def load(
    checkpoint: str | os.PathLike[str],
    *,
    stage: int | None = None,
    device: str | None = None,
    amp: str | None = None,
    dataset: LongTailData | None = None,
) -> ImageClassifier:
    """Load a trained network, with its class names and the transform of its images.

        model = shike_fast.load("runs/x/last.pt")
        model.predict(["cat.jpg", "dog.jpg"]).names

    Args:
        checkpoint: ``last.pt`` or ``best.pt`` of a run; what ``shike_fast.export`` wrote; or weights of elsewhere: of
            the published code of SHIKE, RIDE, SADE, BalPoE or MDCS, or of a plain network with torchvision's names.
        stage: of the method, from 1; default the one that was being trained.
        device: default a GPU where there is one.
        amp: mixed precision; default that of the run.
        dataset: what weights of elsewhere are used on. Without it their classes have numbers for names.

    Returns:
        A :class:`~shike_fast.engine.classifier.Classifier`, a module whose ``network`` is the trained one; for an
        exported program (.pt2, .onnx) something that classifies alike, on the CPU.

    Raises:
        CheckpointError: the file cannot be used.
        ConfigError: the device or the precision cannot.
    """
    path = Path(checkpoint)
    if path.suffix in (TORCH, ONNX):
        given = {"stage": stage, "amp": amp, "dataset": dataset}
        if named := [name for name, value in given.items() if value is not None]:
            raise ConfigError(f"{', '.join(named)}: settled in an exported program; leave it out")
        return load_program(path)
    return Classifier(load_trained(path, stage, {"device": device, "amp": amp}, dataset), path)
