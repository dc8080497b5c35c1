"""Classifiers that begin as the nearest class mean."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from shike_fast.errors import ConfigError
from shike_fast.nn import ClassMeanClassifier, CosineClassifier, LinearClassifier


def require_class_mean_heads(model: Any) -> None:
    """Refuse a network whose first classifiers have no weights for class means.

    Raises:
        ConfigError: saying so.
    """
    head = getattr(model, "classifiers", None)
    if not isinstance(head, CosineClassifier | LinearClassifier):
        raise ConfigError(
            f"--init-classifier: class-means needs cosine or linear classifiers, the network has "
            f"{'none' if head is None else type(head).__name__}; use --init-classifier random"
        )


@torch.no_grad()
def init_classifiers(
    model: Any,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    features: Callable[[Tensor], Tensor] | None = None,
    second: bool = True,
    total: Callable[[Tensor], Tensor] = lambda values: values,
) -> None:
    r"""Let the classifiers of a network begin as its class means, in one pass over the training images.

    A cosine classifier of expert k gets, for each class, the direction of the mean of its features of length 1:
    :math:`w_c = \bar\mu_c / \|\bar\mu_c\|`. A linear one gets :math:`w_c = \mu_c / s^2, \; b_c = -\|\mu_c\|^2 / 2s^2`
    with the mean feature :math:`\mu_c` and the mean squared distance s² of all features from their mean. So the class
    with the largest logit is that of the nearest mean, and the logits are of the order of 1. Classes without images
    keep their weights. Sums are float64.

    Args:
        model: has ``classifiers`` and ``features(images)`` -> [K, B, D]; changed in place. It computes in eval mode,
            and is then in the mode in which it was.
        batches: pairs of images, on the device of the network, and int64 labels [B].
        features: computes the features in place of ``model.features``.
        second: also the second classifiers, ``rt_classifiers``, where they are cosine or linear.
        total: adds up float64 sums over all processes, each of which holds a part of the images.

    Raises:
        ConfigError: the first classifiers are neither cosine nor linear.

    Source: Shi et al., LIFT, ICML 2024, section 4 (for the cosine classifier); Snell et al., "Prototypical Networks",
    NeurIPS 2017, section 2.4 (for the linear one).
    """
    require_class_mean_heads(model)
    heads = [model.classifiers]
    if second and isinstance(getattr(model, "rt_classifiers", None), CosineClassifier | LinearClassifier):
        heads.append(model.rt_classifiers)
    weight = model.classifiers.weight  # [K, D, C]
    experts, dim, classes = weight.shape
    zeros = weight.new_zeros(experts, classes, dim, dtype=torch.float64)
    unit, plain = zeros, zeros.clone()  # sums by class of features of length 1, and of features
    counts = zeros.new_zeros(classes)
    squares = zeros.new_zeros(experts)
    was_training = model.training
    model.eval()
    try:
        for images, labels in batches:
            found = (features or model.features)(images).double()
            unit += ClassMeanClassifier.sums_of(found, labels, classes)
            plain += ClassMeanClassifier.sums_of(found, labels, classes, normalize=False)
            counts += torch.bincount(labels, minlength=classes)
            squares += found.square().sum((1, 2))
    finally:
        model.train(was_training)
    unit, plain, counts, squares = map(total, (unit, plain, counts, squares))
    seen = counts > 0
    mean = plain / counts.clamp(min=1).unsqueeze(1)  # [K, C, D]
    spread = squares / counts.sum() - (plain.sum(1) / counts.sum()).square().sum(1)  # [K]
    spread = torch.where(spread > 0, spread, 1.0).view(-1, 1, 1)
    for head in heads:
        if isinstance(head, LinearClassifier):
            head.weight.copy_(torch.where(seen, (mean / spread).transpose(1, 2), head.weight))
            bias = -mean.square().sum(2) / (2 * spread.squeeze(2))
            head.bias.copy_(torch.where(seen, bias, head.bias))
        else:
            directions = torch.nn.functional.normalize(unit, dim=2).transpose(1, 2)
            head.weight.copy_(torch.where(seen, directions, head.weight))
