"""Images that cannot be read: what is said of them, and how many are too many."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from shike_fast.errors import DataError, warn

# As many images may be broken before training stops; of a large data set this fraction.
_MOST_BROKEN = 100
_MOST_BROKEN_FRACTION = 0.01


def most_broken(images: int) -> int:
    """How many images of a set of this size may be broken before something else must be wrong."""
    return max(_MOST_BROKEN, int(_MOST_BROKEN_FRACTION * images))


@dataclass(frozen=True)
class Broken:
    """An image that could not be read: its number, and a line that names it and says why."""

    index: int
    message: str


class BrokenImages:
    """The images of a data set that could not be read so far; each is reported once.

    Args:
        images: size of the data set.
        stand_in: what stands for a broken image, as the end of a sentence.
        report: called with a line for each.
        most: how many are allowed; None for :func:`most_broken`.
    """

    def __init__(
        self, images: int, stand_in: str, report: Callable[[str], None] = warn, most: int | None = None
    ) -> None:
        self._report = report
        self._images = images
        self._most = most_broken(images) if most is None else most
        self._stand_in = stand_in
        self.messages: dict[int, str] = {}  # by number, without what stands for it

    def __len__(self) -> int:
        return len(self.messages)

    def add(self, broken: Iterable[Broken]) -> None:
        """Take note of what was found in a batch.

        Raises:
            DataError: that makes too many: the files may have gone altogether.
        """
        for image in broken:
            if image.index in self.messages:
                continue
            self.messages[image.index] = image.message
            self._report(f"{image.message}; {self._stand_in}")
            if len(self) > self._most:
                raise DataError(
                    f"{len(self)} of {self._images} images could not be read so far, the last one being "
                    f"{image.message}; look into it with: python -m shike_fast.data check"
                )
