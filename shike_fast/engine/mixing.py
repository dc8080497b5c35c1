"""``--mixup`` and ``--cutmix``: a batch mixed with itself in another order, on the device.

Everything random is drawn on the host, as a function of (seed, epoch, step), and enters the step in two small tensors.
So a captured step stays the same, and a resumed run repeats what the uninterrupted one would have mixed.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

_OF_ORDER = 1  # the number of a stream of random numbers


class Mixing:
    r"""Draws how the batches of a run are mixed.

    mixup (Zhang et al., ICLR 2018) leaves every pixel the share :math:`\lambda \sim \mathrm{Beta}(\alpha, \alpha)` of
    its image. cutmix (Yun et al., ICCV 2019) pastes a box of the other image: its sides are :math:`\sqrt{1 - \lambda}`
    of the image's, its centre lies anywhere, and :math:`\lambda` becomes the share of the pixels that stay. With both,
    a batch takes either with probability 1/2. A batch has one :math:`\lambda`, the same in all processes, and each
    process mixes its share of the images.

    Args:
        mixup: :math:`\alpha` of mixup, 0 for none.
        cutmix: :math:`\alpha` of cutmix, 0 for none.
        epochs: the 0-based epochs from this one on are not mixed.
        seed: of the run.
        rank: of the process.
    """

    def __init__(self, *, mixup: float, cutmix: float, epochs: int, seed: int, rank: int = 0) -> None:
        self._mixup = mixup
        self._cutmix = cutmix
        self._epochs = epochs
        self._seed = seed
        self._rank = rank

    def draw(self, epoch: int, step: int, count: int, height: int, width: int) -> tuple[Tensor, Tensor] | None:
        """How a batch is mixed; None where it is not.

        Args:
            epoch: of the run, from 0.
            step: of the epoch, from 0.
            count: images of this process.
            height, width: of an image, in pixels.

        Returns:
            int64 [count]: the place of each image's partner. float32 [1 + height + width]: lambda, then a number for
            each row and for each column; a pixel keeps the larger of its two numbers of its image, and takes the rest
            from the partner.
        """
        if not (self._mixup or self._cutmix) or epoch >= self._epochs:
            return None
        random = np.random.default_rng((self._seed, epoch, step))
        cuts = self._cutmix > 0 and (self._mixup == 0 or random.random() < 0.5)
        alpha = self._cutmix if cuts else self._mixup
        lam = random.beta(alpha, alpha)
        kept = np.full(1 + height + width, lam, np.float32)
        if cuts:
            rows, columns = (_cut(side, lam, random.random()) for side in (height, width))
            kept[0] = 1 - (len(rows) * len(columns)) / (height * width)
            kept[1:] = 1
            kept[1 + rows.start : 1 + rows.stop] = 0
            kept[1 + height + columns.start : 1 + height + columns.stop] = 0
        order = np.random.default_rng((self._seed, epoch, step, _OF_ORDER, self._rank)).permutation(count)
        return torch.from_numpy(order), torch.from_numpy(kept)


def _cut(side: int, lam: float, centre: float) -> range:
    """The box along one side: ``sqrt(1 - lam)`` of it around ``centre`` in [0, 1), as far as it lies within."""
    length = int(side * math.sqrt(1 - lam))
    begin = int(side * centre) - length // 2
    return range(max(0, begin), min(side, begin + length))


def mix_images(images: Tensor, order: Tensor, kept: Tensor, views: int = 1) -> Tensor:
    """Every image mixed with its partner, in a new tensor.

    Args:
        images: floating [views * B, channels, H, W], the views one after the other.
        order: int64 [B], as :meth:`Mixing.draw` returns it, on the device of the images.
        kept: float32 [1 + H + W], likewise.
        views: of each image; all are mixed with the same view of the partner.

    Returns:
        As ``images``, in the same layout: ``share * images + (1 - share) * partners`` with the share of each pixel.
    """
    height, width = images.shape[2:]
    _, rows, columns = kept.split((1, height, width))
    share = torch.maximum(rows[:, None], columns).to(images.dtype)  # [H, W]
    if views > 1:
        order = (order + len(order) * torch.arange(views, device=order.device)[:, None]).flatten()
    return images[order].lerp_(images, share)
