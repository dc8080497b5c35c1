"""Training steps of stage 1 with a frozen part: computed in every step, or once for each image.

Images are random pixels of CIFAR's size without augmentation. ``all trained`` is the step without ``--freeze``. The
others freeze the trunk, or everything but the classifiers, and compute it in every step, or take what
``--cache-features`` keeps. What filling the cache takes is not in the times; ``facts`` has its seconds and bytes.
"""

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from shike_fast import data
from shike_fast._util.cli import use_device
from shike_fast.data.images.arrays import ArrayDataset
from shike_fast.engine.cached import FeatureCache
from shike_fast.engine.config import resolve
from shike_fast.engine.distributed import Processes
from shike_fast.engine.optimizer import set_lr
from shike_fast.engine.precision import make_autocast
from shike_fast.engine.setup import make_loader, records
from shike_fast.engine.state import prepared_model
from shike_fast.engine.steps import StageSteps
from shike_fast.engine.totals import Totals

CLASSES, SIDE = 100, 32
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
WAYS = {
    "all trained": {},
    "trunk frozen": {"freeze": "trunk"},
    "trunk frozen, cached": {"freeze": "trunk", "cache_features": True},
    "all but classifiers frozen": {"freeze": "all-but-classifiers"},
    "all but classifiers frozen, cached": {"freeze": "all-but-classifiers", "cache_features": True},
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A network, its batch, the batches of an epoch, and how many steps a round has."""

    model: str
    batch: int
    epoch: int
    steps: int
    rounds: int = 3

    def __str__(self) -> str:
        return f"{self.model}, {CLASSES} classes, batch {self.batch}, {SIDE} pixels, float32"


CASES = {"cpu": [Case("resnet20", 128, 8, steps=4)], "cuda": [Case("resnet20", 128, 80, steps=80)]}


def random_data(case: Case) -> data.LongTailData:
    draw = np.random.default_rng(0)
    count = case.epoch * case.batch
    images = draw.integers(256, size=(count, 3, SIDE, SIDE), dtype=np.uint8)
    labels = np.arange(count) % CLASSES
    train = ArrayDataset(images, labels, mean=MEAN, std=STD)
    test = ArrayDataset(images[: case.batch], labels[: case.batch], mean=MEAN, std=STD)
    return data.LongTailData(
        name="random",
        train=train,
        test=test,
        class_names=tuple(map(str, range(CLASSES))),
        class_counts=torch.from_numpy(np.bincount(labels, minlength=CLASSES)),
        in_channels=3,
        image_size=SIDE,
        mean=MEAN,
        std=STD,
        imbalance_factor=None,
        augmentation="none",
        fingerprint="",
    )


class Contender:
    """The loop of a run, in the parts that the trainer is made of."""

    def __init__(self, case: Case, device: torch.device, clock, **settings) -> None:
        given = {"dataset": "cifar100-lt", "model": case.model, "batch_size": case.batch, "augmentation": "none"}
        config = resolve(given | settings)
        dataset, alone = random_data(case), Processes()
        model = prepared_model(config, dataset, device, alone, {}, None)
        loaders = tuple(make_loader(config, dataset, device, train=part) for part in (True, False))
        autocast = make_autocast(config.amp, device)
        cache, begin = None, clock()
        if config.cache_features:
            cache = FeatureCache(model, config, dataset, device, loaders=loaders, processes=alone, autocast=autocast)
        self.facts = {} if cache is None else {"filling_seconds": clock() - begin, "cache_bytes": cache.bytes}
        self.totals = Totals(device)
        self.steps = StageSteps(
            model.train(),
            config,
            1,
            class_counts=dataset.class_counts.to(device),
            processes=alone,
            totals=self.totals,
            record=records(config, dataset, device, alone),
            cache=cache,
        )
        set_lr(self.steps.optimizer, 0.01)
        loader = loaders[0] if cache is None else cache.train_loader
        self.batches: Iterator[tuple[Tensor, Tensor]] = itertools.chain.from_iterable(
            map(loader.epoch, itertools.count())
        )
        self.device = device

    def step(self) -> None:
        images, labels = next(self.batches)
        images = images.to(self.device, memory_format=torch.channels_last)
        self.steps(images, labels.to(self.device))


@pytest.mark.op("training step, frozen")
def test_frozen(case, device, clock, side_by_side):
    use_device(device)
    contenders = {name: Contender(case, device, clock, **settings) for name, settings in WAYS.items()}
    side_by_side(
        {name: contender.step for name, contender in contenders.items()},
        images=case.batch,
        calls=case.steps,
        rounds=case.rounds,
        facts={name: contender.facts for name, contender in contenders.items()},
    )
    assert all(int(contender.totals.bad_step) == 0 for contender in contenders.values())
