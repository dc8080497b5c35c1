"""Accuracy overall, by shot and by class."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from shike_fast.data.shots import percent_by_shot
from shike_fast.engine.graph import CudaGraphRunner
from shike_fast.errors import RunError

Observer = Callable[[Tensor, Tensor, Tensor], None]


class EvaluationInterrupted(Exception):
    """``should_stop`` asked for an end before the last batch."""


class NonFiniteLogitsError(RunError):
    """The model answers with NaN or infinite logits."""


@dataclass(frozen=True)
class Evaluation:
    """Result of one pass over a test set.

    Attributes:
        correct: int64 [C], rightly classified images of each class.
        support: int64 [C], images of each class.
        class_counts: int64 [C], training images of each class.
        expert_correct: int64 [K], images that each expert alone classifies rightly.
    """

    correct: Tensor
    support: Tensor
    class_counts: Tensor
    expert_correct: Tensor

    @classmethod
    def stored(cls, state: dict[str, Any]) -> Evaluation:
        """The evaluation that a checkpoint holds; version 0.2.0 stored an empty calibration error as well."""
        return cls(**{field.name: state[field.name] for field in fields(cls)})

    @property
    def top1(self) -> float:
        """Top-1 accuracy in percent over all images."""
        return _percent(self.correct.sum(), self.support.sum())

    @property
    def class_accuracy(self) -> list[float | None]:
        """Accuracy of each class in percent; None for a class without test images."""
        return [
            _percent(c, n) if n else None for c, n in zip(self.correct.tolist(), self.support.tolist(), strict=True)
        ]

    @property
    def expert_top1(self) -> list[float]:
        """Top-1 accuracy of each expert alone, in percent."""
        total = self.support.sum()
        return [_percent(c, total) for c in self.expert_correct]

    def shots(self) -> dict[str, float | None]:
        """Accuracy in percent over the images of the many-, medium- and few-shot classes; None without images."""
        return percent_by_shot(self.correct, self.support, self.class_counts)


def _percent(part: Tensor | int, whole: Tensor | int) -> float:
    return 100.0 * int(part) / int(whole)


def mean_logits(logits: Tensor) -> Tensor:
    """The usual prediction of several experts, [K, B, C] -> [B, C]."""
    return logits.mean(0)


class Evaluator:
    """Counts what a model classifies rightly, without waiting for the device.

    Args:
        model: called as ``model(images, stage=stage)`` -> logits [K, B, C]; its training mode is restored afterwards.
        stage: which of the network's classifiers to use (1 or 2).
        class_counts: int64 [C], training images of each class.
        device: where the model lives.
        autocast: makes the context around each forward pass.
        record: record the work of a batch as a CUDA graph, and replay it for all batches of its shape.
        scores: the prediction, logits [K, B, C] -> [B, C]: the class with the highest score.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        stage: int,
        class_counts: Tensor,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
        record: bool = False,
        scores: Callable[[Tensor], Tensor] = mean_logits,
    ) -> None:
        self._model = model
        self._scores = scores
        self._stage = stage
        self._class_counts = class_counts.cpu()
        self._device = device
        self._autocast = autocast
        self._correct = torch.zeros(len(class_counts), dtype=torch.int64, device=device)
        self._support = torch.zeros_like(self._correct)
        self._bad = torch.zeros(1, dtype=torch.int64, device=device)  # batches with a logit that is not finite
        self._expert_correct: Tensor | None = None  # [K], once K is known
        self._run: Callable[[Tensor, Tensor], None] = self._add
        if record:
            self._run = CudaGraphRunner(self._add, warm_up=1, stream=torch.cuda.Stream(device))
        self._observe: Observer | None = None

    @torch.no_grad()
    def __call__(
        self,
        batches: Iterable[tuple[Tensor, Tensor]],
        *,
        observe: Observer | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        total: Callable[[Tensor], Tensor] = lambda counts: counts,
    ) -> Evaluation:
        """Evaluate.

        Args:
            batches: pairs of images [B, channels, H, W] and int64 labels [B].
            observe: gets the labels [B], logits [K, B, C] and scores [B, C] of every batch; not with ``record``.
            should_stop: asked before every batch.
            total: adds up counts over all processes, each of which holds a part of the batches; called once.

        Raises:
            EvaluationInterrupted: when ``should_stop()`` becomes true.
            ValueError: if there is not a single batch.
            NonFiniteLogitsError: if a logit is NaN or infinite.
        """
        self._observe = observe
        for counts in (self._correct, self._support, self._bad, self._expert_correct):
            if counts is not None:
                counts.zero_()
        empty = True
        was_training = self._model.training
        self._model.eval()
        try:
            for images, labels in batches:
                if should_stop():
                    raise EvaluationInterrupted
                self._run(images.to(self._device, non_blocking=True), labels.to(self._device, non_blocking=True))
                empty = False
        finally:
            self._model.train(was_training)
        if empty or self._expert_correct is None:
            raise ValueError("evaluate: batches must hold at least one batch, got none")
        parts = (self._correct, self._support, self._expert_correct, self._bad)
        correct, support, expert_correct, bad = total(torch.cat(parts)).cpu().split([len(part) for part in parts])
        if bad:
            raise NonFiniteLogitsError("the model's logits on the test images are not finite: its weights are lost")
        return Evaluation(correct, support, self._class_counts, expert_correct)

    def _add(self, images: Tensor, labels: Tensor) -> None:
        with self._autocast():
            logits = self._model(images, stage=self._stage)  # [K, B, C]
        logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        scores = self._scores(logits)  # [B, C]
        # index_add_, not bincount, which would wait for the device
        self._correct.index_add_(0, labels, (scores.argmax(-1) == labels).long())
        self._support.index_add_(0, labels, torch.ones_like(labels))
        hits = (logits.argmax(-1) == labels).sum(-1)  # [K]
        if self._expert_correct is None:
            self._expert_correct = torch.zeros_like(hits)
        self._expert_correct += hits
        self._bad += ~scores.isfinite().all()
        if self._observe is not None:
            self._observe(labels, logits, scores)


def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    stage: int,
    class_counts: Tensor,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    scores: Callable[[Tensor], Tensor] = mean_logits,
    observe: Observer | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    total: Callable[[Tensor], Tensor] = lambda counts: counts,
) -> Evaluation:
    """Accuracy: one call of an :class:`Evaluator`, whose arguments these are."""
    evaluator = Evaluator(
        model, stage=stage, class_counts=class_counts, device=device, autocast=autocast, scores=scores
    )
    return evaluator(batches, observe=observe, should_stop=should_stop, total=total)
