"""A run from its first epoch to its last: train, test, save, report."""

from __future__ import annotations

import dataclasses
import functools
import gc
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shike_fast import data
from shike_fast._util.files import atomic_write
from shike_fast.data.loaders.loader import EpochLoader, LoadingStopped
from shike_fast.data.shots import SHOTS
from shike_fast.engine import checkpoint, rundir
from shike_fast.engine.averaging import WeightAverage
from shike_fast.engine.cached import FeatureCache
from shike_fast.engine.class_means import init_from_class_means
from shike_fast.engine.config import TrainConfig
from shike_fast.engine.console import RunConsole
from shike_fast.engine.distributed import Processes
from shike_fast.engine.finetuning import CLASS_MEANS
from shike_fast.engine.loading import loader_metrics, speed_note
from shike_fast.engine.metrics import Evaluation, EvaluationInterrupted, Evaluator, NonFiniteLogitsError
from shike_fast.engine.optimizer import set_lr
from shike_fast.engine.precision import make_autocast
from shike_fast.engine.priors import scores_prior, usual_priors
from shike_fast.engine.profile import Profile
from shike_fast.engine.report import write_report
from shike_fast.engine.setup import check_setting, make_loader, records, stage_sampler
from shike_fast.engine.signals import GracefulStop, Interrupted
from shike_fast.engine.state import (
    check_stage,
    data_description,
    memory_format,
    prepared_model,
    restore_average,
    rng_state,
    set_rng_state,
)
from shike_fast.engine.steps import StageSteps
from shike_fast.engine.tail import TailEvaluation, evaluate_tails
from shike_fast.engine.totals import Means, Totals
from shike_fast.engine.trackers import Tracking, require_trackers
from shike_fast.errors import CheckpointError, DataError, RunError

_READ_EVERY = 20  # steps between readings of the totals, where reading waits for the device or for other processes


class NonFiniteLossError(RunError):
    """The loss or the weights became NaN or infinite."""


class Trainer:
    """One run: its model, optimizer, position and files.

    Args:
        config: all settings.
        dataset: what :func:`shike_fast.data.load_dataset` returned for them.
        output_dir: run directory, already created and held by this process.
        device: where to train.
        console: where to report.
        state: checkpoint to go on from, or None for a new run.
        best_file: best checkpoint of the run that ``state`` comes from, copied if ``output_dir`` has none.
        processes: who trains along; all of them make a Trainer, and the first one writes the files.
        profile: write a trace of some steps and print what took the most time.
        source: the file that ``state`` comes from, for errors.

    Attributes:
        late_signal: number of a signal that came after the last step, so that the run was finished; 0 for none.

    Raises:
        ConfigError: if the device or the data set cannot do what the settings ask for.
        CheckpointError: if ``state`` was made with another data set or model, or ``config.pretrained`` does not fit.
    """

    steps: StageSteps
    evaluator: Evaluator

    def __init__(
        self,
        config: TrainConfig,
        dataset: data.LongTailData,
        output_dir: Path,
        *,
        device: torch.device,
        console: RunConsole | None = None,
        state: dict[str, Any] | None = None,
        best_file: Path | None = None,
        processes: Processes = Processes(),  # noqa: B008  (immutable)
        profile: bool = False,
        source: Path = Path(checkpoint.LAST),
    ) -> None:
        self.processes = processes
        self.config = config
        self.dataset = dataset
        self.output_dir = output_dir
        self.device = device
        self.best_file = best_file
        self.train_loader, self.test_loader = processes.run_on_all(self._checked_loaders)
        self.batches = self.train_loader.batches_per_epoch
        self.console = console or RunConsole(config.epochs, self.batches, quiet=not processes.is_main)
        self.profile = Profile(output_dir, self.console, device) if profile and processes.is_main else None

        state = state or {}
        self.model = prepared_model(config, dataset, device, processes, state, source)
        self.memory_format = memory_format(config)
        self._fine_tune(new=not state)
        self.epoch: int = state.get("epoch", 0)  # epochs finished
        self.batch: int = state.get("batch", 0)  # batches finished in the present epoch
        self.history: list[dict[str, Any]] = state.get("history", [])
        self.best: dict[str, Any] | None = state.get("best")
        self.evaluation = Evaluation.stored(state["evaluation"]) if state.get("evaluation") else None
        self.images_per_second: float = state.get("images_per_second", 0.0)  # of the present epoch
        self.seconds: float = state.get("seconds", 0.0)  # that went into it before this process
        self._speed_told = False
        self.late_signal = 0
        self.totals = Totals(device)
        self.method = config.create_method(dataset.class_counts.to(device))
        self.average = WeightAverage(self.model, config.ema) if config.ema else None
        if state:
            check_stage(self.method, state["stage"], source)
            if self.average is not None:
                restore_average(state, self.average, source)
        self._enter_stage(state.get("stage", config.stage_of(0)))
        if state:
            try:
                self.totals.begin(self.batch, state["sums"] if processes.is_main else None)
                self.steps.load_state(state)
                self.method.load_state(state.get("method_state", {}))
                set_rng_state(state["rng"], device)
            except (KeyError, TypeError, ValueError, RuntimeError) as error:
                raise CheckpointError(
                    f"{source}: the checkpoint's training state does not fit its model: {error}"
                ) from error

    def _fine_tune(self, *, new: bool) -> None:
        """Compute what is frozen once for all images, and what a new run's classifiers begin with."""
        setting = (self.model, self.config, self.dataset, self.device)
        options: dict[str, Any] = {
            "processes": self.processes,
            "autocast": make_autocast(self.config.amp, self.device),
        }
        self.cache: FeatureCache | None = None
        if self.config.cache_features:
            loaders = self.train_loader, self.test_loader
            self.cache = FeatureCache(*setting, loaders=loaders, **options)
            self.train_loader, self.test_loader = self.cache.train_loader, self.cache.test_loader
        if new and self.config.init_classifier == CLASS_MEANS:
            init_from_class_means(*setting, cache=self.cache, **options)

    def _checked_loaders(self) -> tuple[EpochLoader, EpochLoader]:
        setting = (self.config, self.dataset, self.device)
        check_setting(*setting, self.processes)
        if self.processes.is_main:
            require_trackers(self.config.tracker)
        train, test = (make_loader(*setting, train=part, processes=self.processes) for part in (True, False))
        return train, test

    def run(self) -> None:
        """Train to the last epoch, saving after each, then write the reports.

        Raises:
            Interrupted: after SIGTERM or Ctrl-C, with the state saved.
            NonFiniteLossError: when the loss or a weight is NaN or infinite; the last checkpoint stays as it was.
            RunError: when the data or a loader process fails under way.
        """
        self._started = time.perf_counter() - self.seconds
        new = self.processes.broadcast_from_main(lambda: not (self.output_dir / checkpoint.LAST).exists())
        if new:
            self._save()  # from the first moment on there is something to resume from
        tracking = None
        if self.processes.is_main:
            self._adopt_best()
            rundir.write_config(self.output_dir, dataclasses.asdict(self.config), self.dataset.validation)
            rundir.write_metrics(self.output_dir, self.history)
            tracking = Tracking(self.config.tracker, self.output_dir, dataclasses.asdict(self.config), self.history)
        try:
            with GracefulStop() as stop:
                for loader in (self.train_loader, self.test_loader):
                    loader.should_stop = lambda: stop.requested and not self.processes.is_distributed
                try:
                    while self.epoch < self.config.epochs:
                        self._train_epoch(stop)
                        row = self._evaluate_epoch(stop)
                        self._finish_epoch(row, tracking)
                    tail = self._evaluate_tails()
                    self.late_signal = self.processes.largest(stop.number, self.device)
                except LoadingStopped:  # no batch came: the state is that of the last step
                    self._stop_if_asked(stop)
                    raise
        except DataError as error:
            raise RunError(str(error)) from error
        finally:
            if self.profile is not None:
                self.profile.close()
            self.console.close()
            self.train_loader.close()
            self.test_loader.close()
            if tracking is not None:
                tracking.close(finished=self.epoch == self.config.epochs)
        if self.device.type == "cuda":
            allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
            self.console.note(f"device memory at its peak: {allocated / 2**30:.2f} GiB of {reserved / 2**30:.2f} held")
        if self.processes.is_main:
            told = (self.config, self.dataset, self.history, self.best, self.evaluation, tail)
            write_report(self.output_dir, self.console, *told)

    def _adopt_best(self) -> None:
        """Bring the best checkpoint of an earlier directory along; without it the search for the best starts anew."""
        best = self.output_dir / checkpoint.BEST
        if self.best is None or best.exists():
            return
        if self.best_file is not None and self.best_file.is_file():
            atomic_write(best, self.best_file.read_bytes())
        else:
            self.console.note(f"no {checkpoint.BEST} of epochs 1 to {self.epoch} at hand: the best of the rest is kept")
            self.best = None

    def _train_epoch(self, stop: GracefulStop) -> None:
        """Train what is left of the present epoch."""
        stage = self.config.stage_of(self.epoch)
        if stage != self.stage:
            self._leave_stage()
            self._enter_stage(stage)
        set_lr(self.steps.optimizer, self.config.lr_of(self.epoch))
        self.steps.start_epoch(self.epoch)
        self.model.train()
        self.console.start_epoch(self.epoch, stage, self.batch)
        waits = self.device.type != "cpu" or self.processes.is_distributed
        read_every = _READ_EVERY if waits else 1
        started, first_batch, trained = time.perf_counter(), self.batch, 0
        if self.batch == self.batches:  # stopped while evaluating: nothing is left to train
            return
        for images, labels in self.train_loader.epoch(self.epoch, start_batch=self.batch):
            if self.batch % (_READ_EVERY if self.processes.is_distributed else 1) == 0:
                self._stop_if_asked(stop)
            trained += self._images_of_step()
            self._step(
                images.to(self.device, non_blocking=True, memory_format=self.memory_format),
                labels.to(self.device, non_blocking=True),
            )
            self.batch += 1
            if self.profile is not None:
                self.profile.step()
            if self.batch % read_every == 0 or self.batch == self.batches:
                means = self._means()
                seconds = time.perf_counter() - started
                self.images_per_second = trained / seconds
                seconds_per_batch = seconds / (self.batch - first_batch)
                self.console.step(self.batch, means.loss, means.accuracy, self.images_per_second, seconds_per_batch)
            if self.config.save_every and self.batch % self.config.save_every == 0 and self.batch < self.batches:
                self._save()

    def _step(self, images: Tensor, labels: Tensor) -> None:
        """One optimizer step with this process's share of a batch."""
        self.steps(images, labels, self._images_of_step(), self.batch)

    def _images_of_step(self) -> int:
        """Images of the next step in all processes together."""
        size = self.config.batch_size
        return min(size, len(self.dataset.train) - self.batch * size)

    def _means(self) -> Means:
        """Means over the epoch so far.

        Raises:
            NonFiniteLossError: if the loss of any step so far was NaN or infinite.
        """
        means = Means(self.processes.total(self.totals.sums).tolist(), self.totals.terms)
        if not math.isfinite(means.loss):
            step = self.processes.largest(int(self.totals.bad_step), self.device)
            raise self._not_finite("loss is", step)
        return means

    def _not_finite(self, what: str, step: int) -> NonFiniteLossError:
        return NonFiniteLossError(
            f"the {what} not finite at step {step} of {self.batches} in epoch {self.epoch + 1}; try a lower --lr, or "
            f"--amp bf16 or off; the last good state is in {self.output_dir / checkpoint.LAST}"
        )

    def _require_finite(self) -> None:
        """Refuse to go on from, or to save over a good state, weights that the next loss would show to be lost.

        Raises:
            NonFiniteLossError: if a weight, a statistic of BatchNorm or the loss of a step so far is NaN or infinite.
        """
        if self.batch:
            self._means()
        values = [value for value in self.model.state_dict().values() if value.is_floating_point()]
        if not torch.nn.utils.get_total_norm(values, math.inf).isfinite():
            raise self._not_finite("weights are", self.batch)

    def _evaluate_epoch(self, stop: GracefulStop) -> dict[str, Any]:
        """Test the model; returns the metrics of the epoch."""
        self._require_finite()
        self.console.testing()
        if self.profile is not None:
            self.profile.between()
        self.processes.send_buffers(self.model)
        if self.tested is not self.model:
            self.processes.send_buffers(self.tested)
        try:
            self.evaluation = self.evaluator(
                self.test_loader.epoch(0),
                should_stop=lambda: stop.requested and not self.processes.is_distributed,
                total=self.processes.total,
            )
        except EvaluationInterrupted:
            self._stop_if_asked(stop)
            raise
        except NonFiniteLogitsError as error:
            raise self._not_finite("logits on the test images are", self.batch) from error
        means = self._means()
        return {
            "epoch": self.epoch + 1,
            "stage": self.stage,
            "lr": self.config.lr_of(self.epoch),
            "train_loss": means.loss,
            "train_top1": means.accuracy,
            "top1": self.evaluation.top1,
            **self.evaluation.shots(),
            "images_per_second": self.images_per_second,
            "seconds": time.perf_counter() - self._started,
            **loader_metrics(self.train_loader, self.test_loader, self.processes, self.device),
            **{f"train_{name}": value for name, value in means.terms.items()},
        }

    def _evaluate_tails(self) -> TailEvaluation:
        """Test the last epoch's model image by image, for the report; a signal no longer stops the run."""
        self.test_loader.should_stop = lambda: False
        learned = scores_prior(self.method, self.steps.stage, self.config.sampler)
        priors = usual_priors(self.dataset.class_counts), learned
        return evaluate_tails(
            self._seen, self.test_loader.epoch(0), *priors, processes=self.processes, **self.test_setting
        )

    def _finish_epoch(self, row: dict[str, Any], tracking: Tracking | None) -> None:
        """Record a finished epoch: checkpoints first, so that a kill can only make a resumed run repeat it."""
        self.history.append(row)
        self._started = time.perf_counter()
        self.epoch += 1
        self.batch = 0
        self.totals.begin(0)
        if self.best is None or row["top1"] > self.best["top1"]:
            self.best = {name: row[name] for name in ("epoch", "stage", "top1", *SHOTS)}
            if self.processes.is_main:
                best = self.output_dir / checkpoint.BEST
                checkpoint.save_checkpoint(self._model_state(), best, keep_previous=False)
        self._save()
        self.console.end_epoch(row)
        note = speed_note(row)
        if note is not None and not self._speed_told:
            self.console.note(note)
            self._speed_told = True
        if tracking is not None:
            rundir.append_metrics(self.output_dir, row)
            tracking.log(row)

    def _leave_stage(self) -> None:
        """Free what only the stage before needed, its recordings above all, before the next one takes memory."""
        del self.steps, self.evaluator
        self.model.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.restart()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _enter_stage(self, stage: int) -> None:
        """Freeze what ``stage`` does not train and start its optimizer afresh."""
        self.stage = stage
        self.train_loader.sampler = stage_sampler(self.config, self.dataset, stage)
        record = records(self.config, self.dataset, self.device, self.processes)
        self.steps = StageSteps(
            self.model,
            self.config,
            stage,
            class_counts=self.method.class_counts,
            processes=self.processes,
            totals=self.totals,
            record=record,
            method=self.method,
            average=self.average,
            cache=self.cache,
        )
        self.tested = self.method.evaluated(self.model if self.average is None else self.average.network)
        self.test_setting: dict[str, Any] = {
            "stage": self.steps.stage.classifiers,
            "class_counts": self.method.class_counts,
            "device": self.device,
            "autocast": self.steps.autocast,
            "scores": functools.partial(self.method.scores, stage=self.steps.stage),
        }
        self._seen = self.tested if self.cache is None else self.cache.network(self.tested)
        self.evaluator = Evaluator(self._seen, record=record, **self.test_setting)

    def _stop_if_asked(self, stop: GracefulStop) -> None:
        """Save and end the run, in all processes at the same step, after a signal to any of them."""
        number = self.processes.largest(stop.number, self.device)
        if number:
            self._save()
            raise Interrupted(number, self.output_dir / checkpoint.LAST)

    def _save(self) -> None:
        self._require_finite()
        sums = self.processes.total(self.totals.sums).tolist()
        if not self.processes.is_main:
            return
        state = self._model_state() | {
            "batch": self.batch,
            "sums": sums,
            **self.steps.state(),
            "history": self.history,
            "evaluation": dataclasses.asdict(self.evaluation) if self.evaluation else None,
            "images_per_second": self.images_per_second,
            "seconds": time.perf_counter() - self._started,
            "rng": rng_state(self.device),
        }
        checkpoint.save_checkpoint(state, self.output_dir / checkpoint.LAST)

    def _model_state(self) -> dict[str, Any]:
        """What it takes to use the model: weights, description, classes, settings."""
        optional = {"method_state": self.method.state(), "average": self.average.state() if self.average else None}
        return {
            "config": dataclasses.asdict(self.config),
            "data": data_description(self.dataset),
            "model_description": self.model.description,
            "model": self.model.state_dict(),
            "stage": self.stage,
            "epoch": self.epoch,
            "best": self.best,
        } | {name: value for name, value in optional.items() if value}
