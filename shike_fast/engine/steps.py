"""The step of a stage: forward, loss, backward, optimizer and running totals, without waiting for the device."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from shike_fast import models
from shike_fast.data.loaders.loader import joined
from shike_fast.engine.averaging import WeightAverage
from shike_fast.engine.cached import FeatureCache
from shike_fast.engine.config import TrainConfig
from shike_fast.engine.distributed import Processes
from shike_fast.engine.graph import CudaGraphRunner, on_side_stream
from shike_fast.engine.mixing import Mixing, mix_images
from shike_fast.engine.optimizer import load_optimizer_state, lr_factors, make_optimizer, optimizer_state
from shike_fast.engine.precision import make_autocast
from shike_fast.engine.totals import Totals
from shike_fast.errors import RunError
from shike_fast.methods import Method

_WARM_UP = 3  # calls before a step is recorded: libraries choose their algorithms, buffers find their place
_WARM_UP_SEVERAL = 11  # DistributedDataParallel rearranges its buckets meanwhile


class StageNetwork(nn.Module):
    """The model as a stage trains it: images [B, channels, H, W] -> what the method's ``forward`` makes of them.

    Args:
        model: the network.
        method: the run's method.
        stage: one of its stages, counted from 1.
    """

    def __init__(self, model: nn.Module, method: Method, stage: int) -> None:
        super().__init__()
        self.model = model
        self.method = method
        self.stage = stage

    def forward(self, images: Tensor) -> Tensor | dict[str, Tensor]:
        return self.method.forward(self.model, images, self.method.stages[self.stage - 1])


class StageSteps:
    """Trains a model through one stage, step by step.

    A step takes this process's share of the images of one optimizer step. With ``accumulate`` = N they go through the
    model in N parts one after the other; every image weighs the same in the gradient, whatever the parts and shares.
    All views of an image are in the same part; the totals count the first one.

    Args:
        model: the network, on its device; the parameters that the stage does not train are frozen here.
        config: the run's settings.
        stage: which one of the method's, counted from 1.
        class_counts: int64 [C], on the device.
        processes: who trains along; they get the mean of all gradients.
        totals: what the steps add to; begun anew here.
        record: record the step as a CUDA graph and replay it.
        method: the run's method; default a new one, made by ``config``.
        average: takes in the weights after every step.
        cache: what the network's frozen part makes of the images; then steps take places in there for images.
    """

    def __init__(
        self,
        model: models.MultiExpertNetwork,
        config: TrainConfig,
        stage: int,
        *,
        class_counts: Tensor,
        processes: Processes,
        totals: Totals,
        record: bool = False,
        method: Method | None = None,
        average: WeightAverage | None = None,
        cache: FeatureCache | None = None,
    ) -> None:
        self.method = method or config.create_method(class_counts)
        self.stage = self.method.stages[stage - 1]
        trained = {id(parameter) for parameter in self.stage.trains(model)}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(id(parameter) in trained and name not in getattr(model, "frozen", ()))
        model.checkpoint_activations = config.checkpoint_activations
        totals.track(self.stage.terms, functools.partial(self.method.scores, stage=self.stage))
        self.model = model
        self.config = config
        self.processes = processes
        self.totals = totals
        self.device = class_counts.device
        self._average = average
        self._mixing = Mixing(
            mixup=config.mixup,
            cutmix=config.cutmix,
            epochs=config.epochs - config.unmixed_epochs,
            seed=config.seed,
            rank=processes.rank,
        )
        self._epoch = 0
        self._phase = self.method.phase(0)
        self._terms = set(self.stage.terms)
        self._views = len(config.views)
        self.autocast = make_autocast(config.amp, self.device)
        named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.optimizer = make_optimizer(
            config.optimizer,
            list(named.values()),
            momentum=config.momentum,
            weight_decay=config.weight_decay_of(self.stage),
            nesterov=config.nesterov,
            lr_factors=lr_factors(
                named.items(),
                self.method,
                self.stage,
                trunk=config.trunk_lr / config.lr if config.trunk_lr is not None else 1.0,
                classifiers=model.classifier_parameters() if config.trunk_lr is not None else (),
            ),
            changeable_lr=record,
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.amp == "fp16")
        network = model if cache is None else cache.network(model)
        self.network: nn.Module = StageNetwork(network, self.method, stage)
        self._distributed: DistributedDataParallel | None = None
        stream = torch.cuda.Stream(self.device) if record else None
        if processes.is_distributed:
            ids = [self.device] if self.device.type == "cuda" else None
            # It remembers the stream for the gradients, which has to be the one that will be recorded.
            with on_side_stream(stream) if stream is not None else contextlib.nullcontext():
                self._distributed = DistributedDataParallel(self.network, device_ids=ids, gradient_as_bucket_view=True)
            # Only running statistics would be sent, before every forward; the trainer sends them when they are used.
            self._distributed.broadcast_buffers = False
            self.network = self._distributed
        if config.compile:
            self.network.compile(dynamic=False)
        self._run: Callable[..., None] = self._step
        if stream is not None:
            warm_up = _WARM_UP_SEVERAL if processes.is_distributed else _WARM_UP
            self._run = CudaGraphRunner(self._step, warm_up=warm_up, stream=stream)

    def start_epoch(self, epoch: int) -> None:
        """Prepare the method for the 0-based ``epoch`` of the run."""
        self._epoch = epoch
        self._phase = self.method.phase(epoch)
        self.method.start_epoch(epoch, self.model, self.stage)

    def __call__(self, images: Tensor, labels: Tensor, of_all: int | None = None, number: int = 0) -> None:
        """One optimizer step.

        Args:
            images: float [V*b, channels, H, W], the V views of this process's share, on the device.
            labels: int64 [b].
            of_all: images of this step in all processes together.
            number: of this step within the epoch, from 0.
        """
        drawn = self._mixing.draw(self._epoch, number, len(labels), *images.shape[2:]) or ()
        mix = (tensor.to(self.device, non_blocking=True) for tensor in drawn)
        self._run(images, labels, of_all or len(labels), self._phase, *mix)

    def _step(
        self,
        images: Tensor,
        labels: Tensor,
        of_all: int,
        phase: int,
        order: Tensor | None = None,
        kept: Tensor | None = None,
    ) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        labels_b = labels
        if order is not None and kept is not None:
            images, labels_b = mix_images(images, order, kept, self._views), labels[order]
        # the same number in all processes, which exchange statistics in every part: what the smallest share allows
        parts = max(1, min(self.config.accumulate, of_all // self.processes.world_size))
        views = [view.tensor_split(parts) for view in images.tensor_split(self._views)]
        of_parts = zip(zip(*views, strict=True), labels.tensor_split(parts), labels_b.tensor_split(parts), strict=True)
        for number, (part, part_labels, part_labels_b) in enumerate(of_parts, start=1):
            with self._without_exchange(number < parts):
                with self.autocast():
                    output = self.network(joined(part))
                second = {} if kept is None else {"target_b": joined([part_labels_b] * self._views), "lam": kept[0]}
                loss, terms, logits = self._loss(output, joined([part_labels] * self._views), phase, second)
                # of the mean over all images; the gradients of the processes are averaged, hence world_size
                share = len(part_labels) * self.processes.world_size / of_all
                self.scaler.scale(loss if share == 1 else loss * share).backward()
            self.totals.add(loss, terms, logits[:, : len(part_labels)], part_labels)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.method.after_step(self.model)
        if self._average is not None:
            self._average.update()
        self.totals.count()

    def _without_exchange(self, wanted: bool) -> AbstractContextManager[object]:
        if wanted and self._distributed is not None:
            return self._distributed.no_sync()
        return contextlib.nullcontext()

    def _loss(
        self,
        output: Tensor | dict[str, Tensor],
        labels: Tensor,
        phase: int = 0,
        second: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Loss of the stage, its terms, and the logits [K, b, C] among what the network returned."""
        inputs = {} if isinstance(output, Tensor) else dict(output)
        logits = output if isinstance(output, Tensor) else inputs.pop("logits")
        loss, terms = self.method.loss(logits, labels, stage=self.stage, epoch=phase, **inputs, **(second or {}))
        if terms.keys() != self._terms:
            raise RunError(
                f"method '{self.method.name}': its loss has the terms {', '.join(terms) or 'none'}, its stage "
                f"{self.stage.name} says {', '.join(self.stage.terms) or 'none'}"
            )
        return loss, terms, logits

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs of the optimizer and the loss scaler."""
        return {"optimizer": optimizer_state(self.optimizer), "scaler": self.scaler.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Undo :meth:`state`."""
        load_optimizer_state(self.optimizer, state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
