"""Two-stage training: multi-expert knowledge transfer, then classifier re-training."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from shike_fast import data, ops
from shike_fast.engine import checkpoint, rundir
from shike_fast.engine.config import TrainConfig
from shike_fast.engine.console import RunConsole
from shike_fast.engine.metrics import SHOTS, Evaluation, EvaluationInterrupted, NonFiniteLogitsError, evaluate
from shike_fast.engine.report import write_report
from shike_fast.engine.signals import GracefulStop
from shike_fast.engine.state import build_model, data_description, restore_data, restore_model, rng_state, set_rng_state
from shike_fast.errors import CheckpointError, DataError, RunError

_AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_TERMS = ("cross_entropy", "hardest", "mutual")
# columns of the running sums of an epoch, all weighted by the images of the step
_LOSS, _CORRECT, _IMAGES, _FIRST_TERM = 0, 1, 2, 3


class NonFiniteLossError(RunError):
    """The loss or the weights became NaN or infinite."""


class Interrupted(Exception):
    """SIGTERM or Ctrl-C ended the run; what was done is saved.

    Attributes:
        exit_status: 128 plus the signal's number, as a shell reports it.
    """

    def __init__(self, stop: GracefulStop, saved: Path) -> None:
        super().__init__(
            f"stopped by {stop.name}; state saved in {saved}; go on with --output-dir {saved.parent} --resume"
        )
        self.exit_status = 128 + stop.number


def make_autocast(amp: str, device: torch.device) -> Callable[[], AbstractContextManager[object]]:
    """Factory of the mixed-precision context named by ``--amp``: ``off``, ``bf16`` or ``fp16``."""
    dtype = _AMP_DTYPES.get(amp)
    if dtype is None:
        return contextlib.nullcontext
    return lambda: torch.autocast(device.type, dtype=dtype)


def make_loader(
    config: TrainConfig,
    dataset: data.LongTailData,
    device: torch.device,
    *,
    train: bool,
    test_batch_size: int | None = None,
) -> data.Loader:
    """Loader of the training images (shuffled) or the test images of a run.

    Test batches are four times as large as training batches unless ``test_batch_size`` says otherwise: a forward pass
    that keeps nothing for a backward one has the memory for it.

    Where the user names no number of workers, images that are decoded or augmented one by one get up to eight
    processes, one a core; those that are prepared a whole batch at a time need none.
    """
    source = dataset.train if train else dataset.test
    workers = config.workers
    if workers is None:
        workers = min(8, os.cpu_count() or 1) if source.one_by_one else 0
    return data.Loader(
        source,
        batch_size=config.batch_size if train else test_batch_size or 4 * config.batch_size,
        seed=config.seed,
        shuffle=train,
        num_workers=workers,
        pin_memory=device.type == "cuda",
    )


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

    Raises:
        CheckpointError: if ``state`` was made with another data set or model, or ``config.pretrained`` does not fit.
    """

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
    ) -> None:
        self.config = config
        self.dataset = dataset
        self.output_dir = output_dir
        self.device = device
        self.best_file = best_file
        self.train_loader = make_loader(config, dataset, device, train=True)
        self.test_loader = make_loader(config, dataset, device, train=False)
        self.batches = self.train_loader.batches_per_epoch
        self.console = console or RunConsole(config.epochs, self.batches)
        self.autocast = make_autocast(config.amp, device)
        self.class_counts = dataset.class_counts.to(device)

        state = state or {}
        torch.manual_seed(config.seed)
        self.model = build_model(config, dataset, pretrained=not state)
        if state:
            restore_data(state, dataset)
            restore_model(state, self.model)
        self.model.to(device)
        self.epoch: int = state.get("epoch", 0)  # epochs finished
        self.batch: int = state.get("batch", 0)  # batches finished in the present epoch
        self.history: list[dict[str, Any]] = state.get("history", [])
        self.best: dict[str, Any] | None = state.get("best")
        self.evaluation = Evaluation(**state["evaluation"]) if state.get("evaluation") else None
        self.images_per_second: float = state.get("images_per_second", 0.0)  # of the present epoch
        no_sums = [0.0] * (_FIRST_TERM + len(_TERMS))
        self.sums = torch.tensor(state.get("sums", no_sums), dtype=torch.float64, device=device)
        # first step of the epoch with a non-finite loss, 0 for none
        self.bad_step = torch.zeros((), dtype=torch.int64, device=device)
        self._enter_stage(state.get("stage", config.stage_of(0)))
        if state:
            try:
                self.optimizer.load_state_dict(state["optimizer"])
                self.scaler.load_state_dict(state["scaler"])
                set_rng_state(state["rng"], device)
            except (KeyError, TypeError, ValueError, RuntimeError) as error:
                raise CheckpointError(f"the checkpoint's training state does not fit its model: {error}") from error

    def run(self) -> None:
        """Train to the last epoch, saving after each, then write the reports.

        Raises:
            Interrupted: after SIGTERM or Ctrl-C, with the state saved.
            NonFiniteLossError: when the loss or a weight is NaN or infinite; the last checkpoint stays as it was.
            RunError: when the data or a loader process fails under way.
        """
        from torch.utils.tensorboard import SummaryWriter

        if not (self.output_dir / checkpoint.LAST).exists():
            self._save()  # from the first moment on there is something to resume from
        self._adopt_best()
        rundir.write_config(self.output_dir, dataclasses.asdict(self.config))
        rundir.write_metrics(self.output_dir, self.history)
        writer = SummaryWriter(str(self.output_dir), purge_step=self.epoch + 1)
        try:
            with GracefulStop() as stop:
                while self.epoch < self.config.epochs:
                    self._train_epoch(stop)
                    row = self._evaluate_epoch(stop)
                    self._finish_epoch(row, writer)
        except DataError as error:
            raise RunError(str(error)) from error
        finally:
            self.console.close()
            writer.close()
            self.train_loader.close()
            self.test_loader.close()
        write_report(self.output_dir, self.console, self.config, self.dataset, self.history, self.best, self.evaluation)

    def _adopt_best(self) -> None:
        """Bring the best checkpoint of an earlier directory along; without it the search for the best starts anew."""
        best = self.output_dir / checkpoint.BEST
        if self.best is None or best.exists():
            return
        if self.best_file is not None and self.best_file.is_file():
            checkpoint.atomic_write(best, self.best_file.read_bytes())
        else:
            self.console.note(f"no {checkpoint.BEST} of epochs 1 to {self.epoch} at hand: the best of the rest is kept")
            self.best = None

    def _train_epoch(self, stop: GracefulStop) -> None:
        """Train what is left of the present epoch."""
        stage = self.config.stage_of(self.epoch)
        if stage != self.stage:
            self._enter_stage(stage)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr_of(self.epoch)
        self.model.train()
        self.console.start_epoch(self.epoch, stage, self.batch)
        read_every = 1 if self.device.type == "cpu" else 20  # reading the sums waits for the device
        started, first_batch, trained = time.perf_counter(), self.batch, 0
        if self.batch == self.batches:  # stopped while evaluating: nothing is left to train
            return
        for images, labels in self.train_loader.epoch(self.epoch, start_batch=self.batch):
            if stop.requested:
                self._save_and_stop(stop)
            self._step(images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True))
            self.batch += 1
            trained += len(labels)
            if self.batch % read_every == 0 or self.batch == self.batches:
                loss, accuracy = self._running_means()
                seconds = time.perf_counter() - started
                self.images_per_second = trained / seconds
                seconds_per_batch = seconds / (self.batch - first_batch)
                self.console.step(self.batch, loss, accuracy, self.images_per_second, seconds_per_batch)
            if self.config.save_every and self.batch % self.config.save_every == 0 and self.batch < self.batches:
                self._save()

    def _step(self, images: Tensor, labels: Tensor) -> None:
        """One optimizer step; adds to the running sums without waiting for the device."""
        with self.autocast():
            logits = self._forward(images)  # [K, B, C]
        loss, terms = self._loss(logits, labels)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        with torch.no_grad():
            size = len(labels)
            correct = (logits.float().mean(0).argmax(-1) == labels).sum()
            means = torch.cat([torch.stack([loss, correct / size, loss.new_ones(())]), terms])
            self.sums += means.double() * size
            bad = (self.bad_step == 0) & ~loss.isfinite()
            self.bad_step = torch.where(bad, self.batch + 1, self.bad_step)

    def _forward(self, images: Tensor) -> Tensor:
        if self.stage == 1:
            return self.model(images, stage=1)
        with torch.no_grad():  # the backbone is frozen, only its BatchNorm statistics move on, as published
            features = self.model.features(images)
        return self.model.classify(features, 2)

    def _loss(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of the present stage and its three terms [3], zeros where it has none."""
        config = self.config
        if self.stage == 1 and config.method == "shike":
            return ops.dkt_loss(
                logits,
                labels,
                hardest_weight=config.hardest_weight,
                mutual_weight=config.mutual_weight,
                kl_reduction=config.kl_reduction,
                return_terms=True,
            )
        if self.stage == 1:
            loss = ops.expert_cross_entropy(logits, labels)
        else:
            loss = ops.balanced_softmax_loss(logits, labels, self.class_counts)
        return loss, loss.new_zeros(len(_TERMS))

    def _running_means(self) -> tuple[float, float]:
        """Mean loss and training accuracy in percent of the epoch so far.

        Raises:
            NonFiniteLossError: if the loss of any step so far was NaN or infinite.
        """
        sums = self.sums.tolist()
        if not math.isfinite(sums[_LOSS]):
            raise self._not_finite("loss is", int(self.bad_step))
        return sums[_LOSS] / sums[_IMAGES], 100 * sums[_CORRECT] / sums[_IMAGES]

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
            self._running_means()
        values = [value for value in self.model.state_dict().values() if value.is_floating_point()]
        if not torch.stack([value.isfinite().all() for value in values]).all():
            raise self._not_finite("weights are", self.batch)

    def _evaluate_epoch(self, stop: GracefulStop) -> dict[str, Any]:
        """Test the model; returns the metrics of the epoch."""
        self._require_finite()
        self.console.testing()
        try:
            self.evaluation = evaluate(
                self.model,
                self.test_loader.epoch(0),
                stage=self.stage,
                class_counts=self.dataset.class_counts,
                device=self.device,
                autocast=self.autocast,
                should_stop=lambda: stop.requested,
            )
        except EvaluationInterrupted:
            self._save_and_stop(stop)
        except NonFiniteLogitsError as error:
            raise self._not_finite("logits on the test images are", self.batch) from error
        loss, accuracy = self._running_means()
        row = {
            "epoch": self.epoch + 1,
            "stage": self.stage,
            "lr": self.config.lr_of(self.epoch),
            "train_loss": loss,
            "train_top1": accuracy,
            "top1": self.evaluation.top1,
            **self.evaluation.shots(),
            "images_per_second": self.images_per_second,
        }
        if self.stage == 1 and self.config.method == "shike":
            terms = (self.sums[_FIRST_TERM:] / self.sums[_IMAGES]).tolist()
            row |= {f"train_{name}": value for name, value in zip(_TERMS, terms, strict=True)}
        return row

    def _finish_epoch(self, row: dict[str, Any], writer: Any) -> None:
        """Record a finished epoch: checkpoints first, so that a kill can only make a resumed run repeat it."""
        self.history.append(row)
        self.epoch += 1
        self.batch = 0
        self.sums.zero_()
        if self.best is None or row["top1"] > self.best["top1"]:
            self.best = {name: row[name] for name in ("epoch", "stage", "top1", *SHOTS)}
            checkpoint.save_checkpoint(self._model_state(), self.output_dir / checkpoint.BEST, keep_previous=False)
        self._save()
        rundir.append_metrics(self.output_dir, row)
        for name, value in row.items():
            if name not in ("epoch", "stage") and value is not None:
                group = "train" if name.startswith("train_") else "test" if name in ("top1", *SHOTS) else "run"
                writer.add_scalar(f"{group}/{name.removeprefix('train_')}", value, self.epoch)
        self.console.end_epoch(row)

    def _enter_stage(self, stage: int) -> None:
        """Freeze what ``stage`` does not train and start its optimizer afresh."""
        retrained = list(self.model.stage2_parameters())
        members = {id(parameter) for parameter in retrained}
        for parameter in self.model.parameters():
            parameter.requires_grad_((id(parameter) in members) == (stage == 2))
        self.stage = stage
        self.optimizer = torch.optim.SGD(
            [parameter for parameter in self.model.parameters() if parameter.requires_grad],
            lr=self.config.lr,
            momentum=self.config.momentum,
            weight_decay=self.config.weight_decay,
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.config.amp == "fp16")

    def _save_and_stop(self, stop: GracefulStop) -> NoReturn:
        self._save()
        raise Interrupted(stop, self.output_dir / checkpoint.LAST)

    def _save(self) -> None:
        self._require_finite()
        state = self._model_state() | {
            "batch": self.batch,
            "sums": self.sums.tolist(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "history": self.history,
            "evaluation": dataclasses.asdict(self.evaluation) if self.evaluation else None,
            "images_per_second": self.images_per_second,
            "rng": rng_state(self.device),
        }
        checkpoint.save_checkpoint(state, self.output_dir / checkpoint.LAST)

    def _model_state(self) -> dict[str, Any]:
        """What it takes to use the model: weights, description, classes, settings."""
        return {
            "config": dataclasses.asdict(self.config),
            "data": data_description(self.dataset),
            "model_description": self.model.description,
            "model": self.model.state_dict(),
            "stage": self.stage,
            "epoch": self.epoch,
            "best": self.best,
        }
