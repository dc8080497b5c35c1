"""``--init-classifier class-means``: a pass over the training images before the first step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from shike_fast import data, models
from shike_fast.data.images.augmented import AugmentedDataset
from shike_fast.engine.cached import FeatureCache
from shike_fast.engine.config import TrainConfig
from shike_fast.engine.distributed import Processes
from shike_fast.engine.setup import make_loader


def init_from_class_means(
    model: models.MultiExpertNetwork,
    config: TrainConfig,
    dataset: data.LongTailData,
    device: torch.device,
    *,
    processes: Processes,
    autocast: Callable[[], AbstractContextManager[object]],
    cache: FeatureCache | None,
) -> None:
    """Let the classifiers that the method's stages train begin as the class means of the training images.

    The images are as in the test; those of a data set that knows no test transform as in the first epoch.

    Args:
        model: on its device.
        config, dataset, device: of the run.
        processes: each of which sees its share of the images; all get the same classifiers.
        autocast: makes the context around each forward pass.
        cache: what there is of the images already.
    """
    train, test = dataset.train, dataset.test
    if isinstance(train, AugmentedDataset) and isinstance(test, AugmentedDataset):
        train = train.augmented_by(test.augmentation)
    network = model if cache is None else cache.network(model)
    if cache is None:
        as_tested = dataclasses.replace(dataset, test=train)
        loader = make_loader(config, as_tested, device, train=False, processes=processes)
    else:
        loader = cache.training_in_order()

    def features(images: Tensor) -> Tensor:
        with autocast():
            return network.features(images)

    batches = (
        (images.to(device, non_blocking=True), labels.to(device, non_blocking=True))
        for images, labels in loader.epoch(0)
    )
    second = any(stage.classifiers == 2 for stage in config.stages)
    try:
        models.init_classifiers(model, batches, features=features, second=second, total=processes.total)
    finally:
        loader.close()
