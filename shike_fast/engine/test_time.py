"""Weights of the experts, learned on unlabelled test images.

Zhang et al., "Self-Supervised Aggregation of Diverse Experts for Test-Agnostic Long-Tailed Recognition" (NeurIPS 2022),
section 4.3: the mixture whose predictions agree most between two augmented views of an image.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from shike_fast.data import LongTailData
from shike_fast.data.images.augmented import AugmentedDataset
from shike_fast.data.random import permutation
from shike_fast.engine.inference import Trained
from shike_fast.engine.priors import sample
from shike_fast.engine.setup import make_loader
from shike_fast.errors import ConfigError

MOST_EPOCHS = 5
LEAST_WEIGHT = 0.05  # of an expert, rounded to two decimals: below, it is learned no further

Views = tuple[Tensor, Tensor]


class ExpertWeights:
    """A mixture of experts: scores ``Σ_k softmax(v)_k z_k``, v being learned by SGD.

    A step lowers ``−mean_b cos(p_0, p_1)``, where p_j is the softmax of the scores of view j. v starts at 1/K each; as
    published, the weight decay acts on it.

    Args:
        num_experts: K, at least 2.
        lr, momentum, nesterov, weight_decay: of ``torch.optim.SGD``.
        device, dtype: of v.
    """

    def __init__(
        self,
        num_experts: int,
        *,
        lr: float,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if num_experts < 2:
            raise ValueError(f"ExpertWeights: num_experts must be at least 2, got {num_experts}")
        self.free = torch.full((num_experts,), 1 / num_experts, device=device, dtype=dtype, requires_grad=True)
        self.epochs = 0
        self._optimizer = torch.optim.SGD(
            [self.free], lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay
        )

    @property
    def weights(self) -> Tensor:
        """softmax(v): [K], which sum to 1."""
        return self.free.detach().softmax(0)

    def scores(self, logits: Tensor) -> Tensor:
        """The mixture of logits [K, B, C] -> [B, C], with gradient to v where gradients are on."""
        return torch.einsum("k,kbc->bc", self.free.softmax(0).to(logits.dtype), logits)

    @torch.enable_grad()
    def step(self, first: Tensor, second: Tensor) -> Tensor:
        """One step of SGD on the logits of two views of the same images.

        Args:
            first, second: [K, B, C], without gradient.

        Returns:
            The loss before the step, a scalar.
        """
        one, other = (self.scores(logits).softmax(-1) for logits in (first, second))
        loss = -F.cosine_similarity(one, other, dim=-1).mean()
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._optimizer.step()
        return loss.detach()

    def learn(self, epochs: Iterable[Iterable[Views]]) -> None:
        """Learn from epochs of pairs of logits [K, B, C].

        It ends with the epochs, or after one at whose end a weight, rounded to two decimals, is below 0.05.
        """
        for pairs in epochs:
            for first, second in pairs:
                self.step(first, second)
            self.epochs += 1
            if min(round(weight, 2) for weight in self.weights.tolist()) < LEAST_WEIGHT:
                return


def learn_expert_weights(trained: Trained, dataset: LongTailData, prior: Tensor | None = None) -> ExpertWeights:
    """Learn the weights for a trained network on the test images of its data set.

    The views are made by the augmentation of the training, from the seed of the run; the network stays as it is, and
    the optimizer is that of the run's stage. Labels only choose the images of ``prior``.

    Args:
        trained: the network.
        dataset: its data set.
        prior: [C]: learn on the images that :func:`~shike_fast.engine.priors.sample` keeps; None for all.

    Raises:
        ConfigError: there is one expert alone, or the test images cannot be augmented.
    """
    config, test = trained.config, dataset.test
    if config.num_experts < 2:
        raise ConfigError(
            f"--test-time-weights: weighs the experts of a network, method '{config.method}' has "
            f"{config.num_experts} here; train with --experts 2 or more"
        )
    if not isinstance(test, AugmentedDataset):
        raise ConfigError(
            f"--test-time-weights: needs augmented views of the test images, those of {dataset.name} cannot be "
            "augmented; make its data set by shike_fast.data.build_arrays or build_images"
        )
    if config.augmentation == "none":
        raise ConfigError(
            "--test-time-weights: needs two different views of an image, but the run trained with --augmentation none"
        )
    chosen = permutation(config.seed, 0, len(test))  # files are often in the order of the classes
    if prior is not None:
        kept = sample(torch.from_numpy(test.labels), prior).numpy()
        chosen = chosen[kept[chosen]]
    stage = config.stages[trained.stage - 1]
    learned = ExpertWeights(
        config.num_experts,
        lr=getattr(config, stage.lr),
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay_of(stage),
        device=trained.device,
    )
    learned.learn(_epochs(trained, dataset, test, chosen))
    return learned


def _epochs(
    trained: Trained, dataset: LongTailData, test: AugmentedDataset, chosen: np.ndarray
) -> Iterator[Iterator[Views]]:
    views = replace(
        dataset, test=test.selected(chosen).augmented_by(trained.config.augmentation or dataset.augmentation)
    )
    batch_size = trained.config.batch_size
    loader = make_loader(trained.config, views, trained.device, train=False, test_batch_size=batch_size)
    trained.network.eval()

    @torch.no_grad()
    def logits(batch: tuple[Tensor, Tensor]) -> Tensor:
        with trained.autocast():
            return trained.network(batch[0].to(trained.device), stage=trained.classifiers).float()

    try:
        for epoch in range(MOST_EPOCHS):
            pairs = zip(loader.epoch(2 * epoch), loader.epoch(2 * epoch + 1), strict=True)
            yield ((logits(one), logits(other)) for one, other in pairs)
    finally:
        loader.close()
