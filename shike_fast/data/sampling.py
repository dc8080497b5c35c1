"""Which training images an epoch shows, and in which order: samplers, by name.

The order of an epoch is a function of (seed, epoch) and has as many places as there are images, so that an epoch can be
resumed anywhere and shared by any number of processes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

from shike_fast.data.random import STREAM_CLASSES, STREAM_SAMPLES, long_words, permutation

SAMPLES_A_VISIT = 4  # that the class-aware sampler takes of a class at a time, as published
_UNIT = 2.0**-53


class Sampler(ABC):
    """Draws the images of an epoch.

    Args:
        labels: int64 [N], the class of every image. A class without images is passed over: nothing is drawn from it.
        first_epoch: the epoch of the run in which the present stage begins.
        epochs: of that stage.

    Attributes:
        repeats: an epoch may show an image more than once, and another not at all.

    Raises:
        ValueError: there are no images.
    """

    name: str
    repeats = True

    def __init__(self, labels: NDArray[np.int64], *, first_epoch: int = 0, epochs: int = 1) -> None:
        if self.repeats and len(labels) == 0:
            raise ValueError(f"sampler '{self.name}' needs at least one image; of an empty set only 'instance' draws")
        self._size = len(labels)
        self._first_epoch = first_epoch
        self._epochs = epochs

    @abstractmethod
    def order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """The images of an epoch in their order, int64 [N]; a function of (seed, epoch)."""


class Instance(Sampler):
    """Every image once, in random order."""

    name = "instance"
    repeats = False

    def order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        return permutation(seed, epoch, self._size)


class ClassAware(Sampler):
    """Classes in equal shares (Shen et al., "Relay Backpropagation", ECCV 2016; cRT of Kang et al., ICLR 2020).

    Classes are visited in random order, all of them before any is visited again, each time in a new order. A visit
    takes four images from the shuffled list of the class, which is shuffled anew when it is used up. Within an epoch
    the images of classes differ in number by four at most, the showings of two images of a class by one.
    """

    name = "class-aware"

    def __init__(self, labels: NDArray[np.int64], *, first_epoch: int = 0, epochs: int = 1) -> None:
        super().__init__(labels, first_epoch=first_epoch, epochs=epochs)
        self._members = np.argsort(labels, kind="stable")  # the images, class by class
        _, self._starts, self._counts = np.unique(labels[self._members], return_index=True, return_counts=True)

    def order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        classes = len(self._counts)
        rounds = -(-self._size // (SAMPLES_A_VISIT * classes))
        keys = long_words(seed, epoch, np.arange(rounds * classes), STREAM_CLASSES).reshape(rounds, classes)
        visited = np.argsort(keys, axis=1, kind="stable")
        drawn = np.repeat(visited, SAMPLES_A_VISIT, axis=1).ravel()[: self._size]  # the class at each place
        place = np.arange(self._size)
        before = place // (SAMPLES_A_VISIT * classes) * SAMPLES_A_VISIT + place % SAMPLES_A_VISIT  # draws of it so far

        # The lists of each class that the epoch needs, one after the other, class by class.
        lists = -(-np.bincount(drawn, minlength=classes) // self._counts)
        lengths = lists * self._counts
        begins = np.cumsum(lengths) - lengths
        of_class = np.repeat(np.arange(classes), lengths)
        number, member = np.divmod(np.arange(len(of_class)) - begins[of_class], self._counts[of_class])
        images = self._members[self._starts[of_class] + member]
        keys = long_words(seed, epoch, images, STREAM_SAMPLES, repeats=number)
        shuffled = images[np.lexsort((keys, number, of_class))]
        return shuffled[begins[drawn] + before]


class _Weighted(Sampler):
    """Draws independently of one another, with replacement: a class by its probability, then any image of it."""

    def __init__(self, labels: NDArray[np.int64], *, first_epoch: int = 0, epochs: int = 1) -> None:
        super().__init__(labels, first_epoch=first_epoch, epochs=epochs)
        _, self._classes, self._counts = np.unique(labels, return_inverse=True, return_counts=True)

    @abstractmethod
    def probabilities(self, epoch: int) -> NDArray[np.float64]:
        """That a draw is of a class, for each class that has images, in their order."""

    def order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        ends = np.cumsum((self.probabilities(epoch) / self._counts)[self._classes])
        words = long_words(seed, epoch, np.arange(self._size), STREAM_SAMPLES)
        drawn = (words >> np.uint64(11)) * _UNIT * ends[-1]
        return np.minimum(np.searchsorted(ends, drawn, side="right"), self._size - 1)  # the product may be rounded up


class SquareRoot(_Weighted):
    """p_c ∝ √n_c (Mahajan et al., "Exploring the Limits of Weakly Supervised Pretraining", ECCV 2018)."""

    name = "square-root"

    def probabilities(self, epoch: int) -> NDArray[np.float64]:
        roots = np.sqrt(self._counts)
        return roots / roots.sum()


class Progressive(_Weighted):
    """p_c = (1 − t)·n_c/N + t/C, where t goes from 0 in the first epoch of a stage to 1 in its last.

    The progressively-balanced sampling of Kang et al., "Decoupling Representation and Classifier" (ICLR 2020), eq. 3.
    C counts the classes that have images. A stage of one epoch has t = 0.
    """

    name = "progressive"

    def probabilities(self, epoch: int) -> NDArray[np.float64]:
        share = min(max((epoch - self._first_epoch) / max(1, self._epochs - 1), 0.0), 1.0)
        return (1 - share) * self._counts / self._size + share / len(self._counts)


SAMPLERS: dict[str, type[Sampler]] = {kind.name: kind for kind in (Instance, ClassAware, SquareRoot, Progressive)}


def check_sampler(name: str) -> str:
    """Return ``name``, or raise ValueError when no sampler is called so."""
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}; choose one of {', '.join(SAMPLERS)}")
    return name


def make_sampler(name: str, labels: NDArray[np.int64], *, first_epoch: int = 0, epochs: int = 1) -> Sampler:
    """A sampler by name.

    Args:
        name: a key of ``SAMPLERS``.
        labels: int64 [N], the class of every training image.
        first_epoch: the epoch of the run in which its stage begins.
        epochs: of that stage.

    Raises:
        ValueError: there is none of that name, or nothing that it could draw.
    """
    return SAMPLERS[check_sampler(name)](labels, first_epoch=first_epoch, epochs=epochs)


def count_repeats(order: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many times each image stands in an order before its place: int64 [N], as ``order``."""
    places = np.argsort(order, kind="stable")
    images = order[places]
    first = np.flatnonzero(np.diff(images, prepend=-1))
    lengths = np.diff(first, append=len(order))
    repeats = np.empty_like(order)
    repeats[places] = np.arange(len(order)) - np.repeat(first, lengths)
    return repeats
