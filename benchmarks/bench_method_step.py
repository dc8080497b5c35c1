"""A whole training step of each method, first stage, against its published formulation in eager PyTorch.

Both at the method's recipe for CIFAR-100-LT, in the phase of the last epochs, with few images: forward, loss, backward
and SGD on random tensors that need no loader; a method of several views sees each image as often, one with mixup mixes
them. ``peer`` is ``peer_networks.py`` with ``peer_losses.py``; ``shike_fast`` the step of ``python -m
shike_fast.train`` by default. A case that ends in "compiled" also has both with their networks compiled, for minutes
each: ``-k "not compiled"`` is quick. ``--benchmark-disable`` makes one round.
"""

import dataclasses
import itertools
from collections.abc import Callable

import pytest
import torch
from peer_losses import PEERS
from peer_networks import make_network
from torch import Tensor

from shike_fast import methods, models
from shike_fast._util.cli import use_device
from shike_fast.engine.config import TrainConfig, resolve
from shike_fast.engine.distributed import Processes
from shike_fast.engine.optimizer import set_lr
from shike_fast.engine.steps import StageSteps
from shike_fast.engine.totals import Totals

CLASSES, SIDE, LR = 100, 32, 0.01
ROUNDS = 7


@dataclasses.dataclass(frozen=True)
class Case:
    method: str
    batch: int
    model: str = "resnet32"
    compiled: bool = False  # torch.compile takes part

    def __str__(self) -> str:
        return f"{self.method}, {self.model}, batch {self.batch}" + (", compiled" if self.compiled else "")

    def config(self, **settings: object) -> TrainConfig:
        given = {"dataset": "cifar100-lt", "method": self.method, "model": self.model, "batch_size": self.batch}
        return resolve(given | settings)


CASES = {
    device: [Case(name, batch, compiled=c) for c in (False, True) for name in methods.list_methods()]
    for device, batch in {"cpu": 32, "cuda": 128}.items()
}


class Batches:
    """Two random batches in turn: images [V*b, 3, 32, 32], labels [b]."""

    def __init__(self, case: Case, views: int, device: torch.device, layout: torch.memory_format) -> None:
        generator = torch.Generator(device).manual_seed(0)
        made = []
        for _ in range(2):
            images = torch.randn(case.batch, 3, SIDE, SIDE, generator=generator, device=device)
            labels = torch.randint(CLASSES, (case.batch,), generator=generator, device=device)
            made.append((images.repeat(views, 1, 1, 1).contiguous(memory_format=layout), labels))
        self._upcoming = itertools.cycle(made)

    def __next__(self) -> tuple[Tensor, Tensor]:
        return next(self._upcoming)


def counts_of(device: torch.device) -> Tensor:
    """Of CIFAR-100-LT at factor 100."""
    return (500 * 0.01 ** (torch.arange(CLASSES, dtype=torch.float64) / (CLASSES - 1))).floor().to(device)


class Peer:
    """The published way."""

    def __init__(self, case: Case, device: torch.device, *, compiled: bool = False) -> None:
        config = case.config()
        self.views, self.mixup = len(config.views), config.mixup
        arguments = config.model_arguments()
        branches = len(config.branch_shares) if case.method == "reslt" else 0
        self.network = make_network(num_classes=CLASSES, branches=branches, **arguments).to(device)
        if compiled:
            self.network.compile(dynamic=False)
        # labels are smoothed in the second stage of los alone
        loss_of = PEERS["ce" if case.method == "los" else case.method]
        self.loss = loss_of(counts_of(device), config.num_experts).float().to(device)
        if case.method == "ride":
            self.loss.factor *= config.additional_diversity_factor / self.loss.diversity_factor
        self.optimizer = torch.optim.SGD(
            self.network.parameters(),
            lr=LR,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            nesterov=config.nesterov,
        )
        self.batches = Batches(case, self.views, device, torch.contiguous_format)

    def __call__(self) -> Tensor:
        """A step; returns its loss."""
        images, labels = next(self.batches)
        mixed = {}
        if self.mixup:
            lam = float(torch.distributions.Beta(self.mixup, self.mixup).sample())
            order = torch.randperm(len(images), device=images.device)
            images = lam * images + (1 - lam) * images[order]
            mixed = {"target_b": labels[order], "lam": lam}
        loss = self.loss(self.network(images), labels.repeat(self.views), **mixed)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()


class ShikeFast:
    """This package's step."""

    def __init__(self, case: Case, device: torch.device, *, compiled: bool = False) -> None:
        config = case.config(compile=compiled)
        network = models.create_model(num_classes=CLASSES, **config.model_arguments())
        methods.find_method(case.method).extend_model(network, config)
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        self.network = network.to(device, memory_format=layout)
        self.totals = Totals(device)
        self.steps = StageSteps(
            self.network,
            config,
            1,
            class_counts=counts_of(device).long(),
            processes=Processes(),
            totals=self.totals,
            record=device.type == "cuda",  # as by default for small images
        )
        self.steps.start_epoch(config.epochs - config.stage2_epochs - 1)
        set_lr(self.steps.optimizer, LR)
        self.batches = Batches(case, len(config.views), device, layout)

    def __call__(self) -> None:
        self.steps(*next(self.batches))


WAYS: dict[str, Callable[[Case, torch.device], Peer | ShikeFast]] = {
    "peer": Peer,
    "peer, torch.compile": lambda case, device: Peer(case, device, compiled=True),
    "shike_fast": ShikeFast,
    "shike_fast, torch.compile": lambda case, device: ShikeFast(case, device, compiled=True),
}


@pytest.mark.op("step of a method")
def test_method_step(case, device, peak_memory, side_by_side, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)  # as in training, for all; so is the next line
    use_device(device)
    torch._dynamo.reset()
    contenders, facts = {}, {}
    for name, make in WAYS.items():
        if "torch.compile" in name and not case.compiled:
            continue
        contender = contenders[name] = make(case, device)
        for _ in range(1 if device.type == "cpu" else 4):  # compiles; the third call on a GPU records the step
            contender()
        facts[name] = {"peak_extra_bytes": peak_memory(contender)}
    calls = 2 if device.type == "cpu" else 50
    side_by_side(contenders, images=case.batch, calls=calls, rounds=ROUNDS, facts=facts, compact=True)
    trained = [contender for contender in contenders.values() if isinstance(contender, ShikeFast)]
    assert all(int(contender.totals.bad_step) == 0 for contender in trained)
