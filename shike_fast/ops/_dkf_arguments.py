"""The arguments of the fused kernels of depth-wise knowledge fusion, the same for every backend."""

from typing import NamedTuple

import torch
from torch import Tensor

from shike_fast.ops._checks import accumulation_dtype


class BatchNormArguments(NamedTuple):
    """The arguments of one batch normalisation, as ``torch.nn.functional.batch_norm`` takes them.

    ``weight`` γ and ``bias`` β [C], or None for 1 and 0; ``running_mean`` and ``running_var`` [C], updated in place
    when training, or None, both together and in training only; ``training``: normalise with the statistics of this
    batch, else with the running ones; ``momentum``: the share of this batch in the new running statistics; ``eps`` is
    added to the variance, > 0.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    training: bool
    momentum: float = 0.1
    eps: float = 1e-5


class DkfArguments(NamedTuple):
    """K experts' maps of one shape and dtype, and the vectors of their n normalisations.

    n is 0 (``dkf_pool``), K (the shallow maps are normalised) or 2K (the deep ones too: shallow norms first). The
    vectors are contiguous [C] in the accumulation dtype.
    """

    deep: list[Tensor]  # K tensors [B, C, H, W]
    shallow: list[Tensor]  # K
    shortcut: list[Tensor]  # K, or none: the deep maps are taken as they are
    weight: list[Tensor | None]  # n
    bias: list[Tensor | None]  # n
    relu: list[bool]  # K

    @property
    def experts(self) -> int:
        return len(self.deep)

    @property
    def norms(self) -> int:
        return len(self.weight)

    @property
    def normalised(self) -> bool:
        return len(self.weight) > 0

    @property
    def folded(self) -> bool:
        return len(self.shortcut) > 0

    @property
    def sums(self) -> int:
        """Sums over positions that the backward needs for each expert, sample and channel."""
        return 2 * self.norms // self.experts

    @property
    def maps(self) -> list[Tensor]:
        return [*self.deep, *self.shallow, *self.shortcut]

    @property
    def values(self) -> int:
        """B·H·W, the values of a channel."""
        batch, _, height, width = self.deep[0].shape
        return batch * height * width

    def new(self, *shape: int) -> Tensor:
        """Uninitialised memory in the accumulation dtype."""
        first = self.deep[0]
        return first.new_empty(shape, dtype=accumulation_dtype(first.dtype))

    def new_results(self, training: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Memory for f [K, B, C], sums [K, S, B, C], mean and rstd [n, 3, C] and statistics [n, 2, C].

        Where it is not training, the latter two are empty.
        """
        batch, channels = self.deep[0].shape[:2]
        norms = self.norms if training else 0
        return (
            self.deep[0].new_empty((self.experts, batch, channels)),
            self.new(self.experts, self.sums, batch, channels),
            self.new(norms, 3, channels),
            self.new(norms, 2, channels),
        )

    def new_gradients(self) -> list[Tensor]:
        """Memory for the gradients of all maps, in the order of ``maps``."""
        return [torch.empty_like(map_) for map_ in self.maps]
