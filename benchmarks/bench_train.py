"""Whole training steps of stage 1, from the loader to the optimizer: the published way against this package.

``peer`` is benchmarks/peer.py, ``shike_fast`` the loader and the step that ``python -m shike_fast.train``
would choose: maps channels-last, fused operators, fused optimizer; images augmented on the device, and on a GPU the
step of small images recorded as a CUDA graph. Either also with its network compiled, and this package with maps in
NCHW and under bfloat16 autocast, to see what layout and precision are worth. All start from random weights.

Small images are random pixels with CIFAR's published augmentation; large ones random normal tensors already on the
device, so that no loader is timed. On a GPU large images, and small ones as a second case, train under bfloat16
autocast.

Throughput is that of the undisturbed loop. The shares of the phases come from further steps that wait for the device
after every phase; a recorded step runs as it was before the recording there. Peak memory is what PyTorch's allocators
have in use beyond what they had before a step, parameters and momentum not counted, and of a recorded step again
before the recording.
"""

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import peer
import pytest
import torch
from torch import Tensor

from shike_fast import data, models
from shike_fast._util.cli import use_device
from shike_fast.data.images.arrays import ArrayDataset
from shike_fast.engine.config import resolve
from shike_fast.engine.distributed import Processes
from shike_fast.engine.optimizer import set_lr
from shike_fast.engine.precision import make_autocast
from shike_fast.engine.setup import make_loader
from shike_fast.engine.steps import StageSteps
from shike_fast.engine.totals import Totals

PHASES = ("loader", "forward", "loss", "backward", "optimizer")
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
LR = 0.01
MOST_WORKERS = 8

Batches = Iterator[tuple[Tensor, Tensor]]
Clock = Callable[[], float]


@dataclasses.dataclass(frozen=True)
class Case:
    """What is trained.

    Attributes:
        steps: timed in a round. This package augments some batches at a time, eight of CIFAR's on a CPU and a whole
            epoch on a GPU: a round has to last as long.
        rounds: of all contenders side by side.
        epoch: batches of an epoch of augmented images; 0 for tensors that need no loader.
        compiled: also with compiled networks. Not where compiling takes minutes, on a CPU for the deep network, nor
            twice for one.
    """

    model: str
    num_classes: int
    batch: int
    side: int
    amp: str
    steps: int
    rounds: int
    epoch: int = 0
    compiled: bool = True

    def __str__(self) -> str:
        precision = "float32" if self.amp == "off" else f"{self.amp} autocast"
        return f"{self.model}, {self.num_classes} classes, batch {self.batch}, {self.side} pixels, {precision}"


SMALL, LARGE = ("resnet32", 100, 128, 32), ("resnet50", 1000, 128, 224)
CASES = {
    "cpu": [
        Case(*SMALL, "off", steps=8, rounds=3, epoch=80),
        Case("resnet50", 1000, 8, 224, "off", steps=1, rounds=3, compiled=False),
    ],
    "cuda": [
        Case(*SMALL, "off", steps=80, rounds=3, epoch=80, compiled=False),
        Case(*SMALL, "bf16", steps=80, rounds=5, epoch=80),
        Case(*LARGE, "bf16", steps=10, rounds=5),
    ],
}


class Peer:
    """The peer's loop."""

    def __init__(self, case: Case, device: torch.device, *, compiled: bool = False) -> None:
        self.case = case
        self.device = device
        self.network = getattr(peer, case.model)(case.num_classes).to(device)
        if compiled:
            self.network.compile(dynamic=False)
        self.optimizer = peer.make_optimizer(self.network, lr=LR)
        self.autocast = make_autocast(case.amp, device)
        self.workers = 0
        self.batches = self._batches(workers=0)
        self.step()  # compiles

    def step(self) -> None:
        for _ in self.phases():
            pass

    def phases(self) -> Iterator[str]:
        """A step; yields the name of each phase when it is over."""
        images, labels = (tensor.to(self.device, non_blocking=True) for tensor in next(self.batches))
        yield "loader"
        with self.autocast():
            logits = self.network(images)
        yield "forward"
        with self.autocast():
            loss = peer.dkt_loss(logits, labels)
        yield "loss"
        self.optimizer.zero_grad()
        loss.backward()
        yield "backward"
        self.optimizer.step()
        yield "optimizer"

    def _batches(self, workers: int) -> Batches:
        case = self.case
        if not case.epoch:
            return itertools.cycle(tensors(case, self.device))
        images, labels = pixels(case)
        dataset = peer.AugmentedImages(images.transpose(0, 2, 3, 1).copy(), labels, mean=MEAN, std=STD)
        return peer.batches(dataset, batch_size=case.batch, workers=workers, pin_memory=self.device.type == "cuda")

    def choose_workers(self, clock: Clock) -> None:
        """Go on with the faster of none and up to eight, one a core, as published: no slow loader for a peer.

        Where the network computes on the same few cores, workers may win nothing.
        """
        tried = []
        for workers in sorted({0, min(MOST_WORKERS, os.cpu_count() or 1)}):
            batches = self.batches = self._batches(workers)
            self.step()  # starts the workers
            begin = clock()
            for _ in range(self.case.steps // 2):
                self.step()
            tried.append((clock() - begin, workers, batches))
        _, self.workers, self.batches = min(tried, key=lambda trial: trial[0])


class ShikeFast:
    """This package's loop, in the parts that its trainer is made of."""

    workers = 0  # of the loader that works on the device

    def __init__(
        self,
        case: Case,
        device: torch.device,
        *,
        compiled: bool = False,
        channels_last: bool = True,
        amp: str | None = None,
    ) -> None:
        config = resolve(
            {
                "dataset": "cifar100-lt",
                "model": case.model,
                "batch_size": case.batch,
                "amp": amp or case.amp,
                "compile": compiled,
                "channels_last": channels_last,
            }
        )
        model = models.create_model(num_classes=case.num_classes, **config.model_arguments())
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        model.to(device)
        model.to(memory_format=self.layout)
        self.network = model
        self.totals = Totals(device)
        self.steps = StageSteps(
            model,
            config,
            1,
            class_counts=torch.ones(case.num_classes, dtype=torch.int64, device=device),
            processes=Processes(),
            totals=self.totals,
            record=device.type == "cuda" and case.epoch > 0,  # as by default for small images
        )
        set_lr(self.steps.optimizer, LR)
        if case.epoch:
            loader = make_loader(config, random_data(case), device, train=True)
            self.batches: Batches = itertools.chain.from_iterable(map(loader.epoch, itertools.count()))
        else:
            self.batches = itertools.cycle(tensors(case, device, memory_format=self.layout))
        self.step()  # compiles

    def step(self) -> None:
        self.steps(*self._next())

    def _next(self) -> tuple[Tensor, Tensor]:
        """A batch in the network's layout, as the trainer passes it on."""
        images, labels = next(self.batches)
        return images.contiguous(memory_format=self.layout), labels

    def phases(self) -> Iterator[str]:
        """A step as :class:`StageSteps` makes it; yields the name of each phase when it is over."""
        steps = self.steps
        images, labels = self._next()
        yield "loader"
        with steps.autocast():
            logits = steps.network(images)
        yield "forward"
        loss, terms = steps.method.loss(logits, labels)
        self.totals.add(loss, terms, logits, labels)
        yield "loss"
        steps.optimizer.zero_grad(set_to_none=True)
        steps.scaler.scale(loss).backward()
        yield "backward"
        steps.scaler.step(steps.optimizer)
        steps.scaler.update()
        self.totals.count()
        yield "optimizer"


def pixels(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Random images uint8 [N, 3, H, W] and labels int64 [N] of an epoch of whole batches."""
    draw = np.random.default_rng(0)
    count = case.epoch * case.batch
    images = draw.integers(256, size=(count, 3, case.side, case.side), dtype=np.uint8)
    return images, draw.integers(case.num_classes, size=count)


def random_data(case: Case) -> data.LongTailData:
    images, labels = pixels(case)
    train = ArrayDataset(images, labels, mean=MEAN, std=STD, augmentation="cifar")
    return data.LongTailData(
        name="random",
        train=train,
        test=train,
        class_names=tuple(map(str, range(case.num_classes))),
        class_counts=torch.from_numpy(np.bincount(labels, minlength=case.num_classes)),
        in_channels=3,
        image_size=case.side,
        mean=MEAN,
        std=STD,
        imbalance_factor=None,
        augmentation="cifar",
        fingerprint="",
    )


def tensors(
    case: Case, device: torch.device, memory_format: torch.memory_format = torch.contiguous_format
) -> list[tuple[Tensor, Tensor]]:
    """Two batches on the device."""
    generator = torch.Generator(device).manual_seed(0)
    batches = []
    for _ in range(2):
        images = torch.randn(case.batch, 3, case.side, case.side, generator=generator, device=device)
        labels = torch.randint(case.num_classes, (case.batch,), generator=generator, device=device)
        batches.append((images.to(memory_format=memory_format), labels))
    return batches


def shares(contender: Peer | ShikeFast, steps: int, clock: Clock) -> dict[str, float]:
    """Each phase's share of the time of some steps."""
    seconds = dict.fromkeys(PHASES, 0.0)
    for _ in range(steps):
        begin = clock()
        for phase in contender.phases():
            end = clock()
            seconds[phase] += end - begin
            begin = end
    total = sum(seconds.values())
    return {phase: round(part / total, 4) for phase, part in seconds.items()}


@pytest.mark.op("training step")
def test_train(case, device, clock, peak_memory, side_by_side, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)  # as in training, for all; so is the next line
    use_device(device)
    torch._dynamo.reset()
    contenders: dict[str, Peer | ShikeFast] = {}
    facts: dict[str, dict[str, Any]] = {}
    ways: dict[str, Callable[[], Peer | ShikeFast]] = {
        "peer": lambda: Peer(case, device),
        "peer, torch.compile": lambda: Peer(case, device, compiled=True),
        "shike_fast": lambda: ShikeFast(case, device),
        "shike_fast, torch.compile": lambda: ShikeFast(case, device, compiled=True),
        "shike_fast, NCHW": lambda: ShikeFast(case, device, channels_last=False),
        "shike_fast, bf16": lambda: ShikeFast(case, device, amp="bf16"),
    }
    for name, make in ways.items():
        if ("compile" in name and not case.compiled) or ("bf16" in name and case.amp == "bf16"):
            continue
        contender = contenders[name] = make()
        facts[name] = {"peak_extra_bytes": peak_memory(contender.step)}
        for _ in range(3 if device.type == "cuda" else 0):  # the second of them records the step
            contender.step()
    for name, contender in contenders.items():
        if case.epoch and isinstance(contender, Peer):
            contender.choose_workers(clock)
        facts[name] |= {"shares": shares(contender, case.steps, clock), "workers": contender.workers}
    side_by_side(
        {name: contender.step for name, contender in contenders.items()},
        images=case.batch,
        calls=case.steps,
        rounds=case.rounds,
        facts=facts,
    )
    trained = [contender for contender in contenders.values() if isinstance(contender, ShikeFast)]
    assert all(int(contender.totals.bad_step) == 0 for contender in trained)
