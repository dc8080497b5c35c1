"""What the figures of a data set suggest to do, a sentence each. docs/methods.md has the sources."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from shike_fast.data.description.sizes import ClassSizes

if TYPE_CHECKING:
    from shike_fast.data.description.describe import Description

_BALANCED_BELOW = 2.0  # of the imbalance factor
_LONG_TAILED_FROM = 10.0  # the smallest factor of which the field publishes results
_HARDLY_ANY = 5  # training images of a class
_FEW_TESTS = 10  # test images of a class


def advise(description: Description) -> tuple[str, ...]:
    """Sentences about the method, the smallest classes, the test set and what to mend first."""
    return (
        *_on_the_method(description),
        *_on_small_classes(description),
        *_on_the_test(description),
        *_on_copies(description),
    )


def _on_the_method(description: Description) -> Iterator[str]:
    factor = description.sizes.imbalance_factor
    if len(description.sized) < 2:
        yield "There is one class: nothing to tell apart."
    elif factor < _BALANCED_BELOW:
        yield "The classes are of about one size: --method ce is enough, long-tail methods have nothing to correct."
    elif factor < _LONG_TAILED_FROM:
        yield (
            "Mildly imbalanced: compare --method ce with la or balanced-softmax, which correct it for the class counts "
            "and cost no more time (docs/methods.md)."
        )
    else:
        yield (
            "Long-tailed: begin with --method la or balanced-softmax, which cost no more time than ce. Methods of "
            "several experts, such as shike, balpoe or sade, publish higher accuracies at a higher cost; whether that "
            "holds for your images only a comparison tells (docs/methods.md)."
        )


def _on_small_classes(description: Description) -> Iterator[str]:
    tiny = sum(size < _HARDLY_ANY for size in description.sized)
    if tiny:
        yield (
            f"{_number(tiny, 'class has', 'classes have')} fewer than {_HARDLY_ANY} training images. No method makes "
            "up for images that are not there: collect some, or begin with weights of another data set (--pretrained)."
        )


def _on_the_test(description: Description) -> Iterator[str]:
    tests = [count for count in description.test_counts if count > 0]
    if not tests:
        return
    if min(tests) < _FEW_TESTS:
        yield (
            f"The smallest test class has {_number(min(tests), 'image', 'images')}: one image is "
            f"{100 / min(tests):.0f} points of its accuracy. Rely on means over shots, and on several seeds."
        )
    if ClassSizes.of(tests).imbalance_factor >= _BALANCED_BELOW:
        yield "The test classes differ in size: read balanced accuracy beside top-1 (docs/evaluation.md)."


def _on_copies(description: Description) -> Iterator[str]:
    if description.duplicates is None:
        return
    if description.duplicates.leaked:
        yield "Test images that are training images as well flatter the accuracy: remove them from one side."
    if description.duplicates.contradictory:
        yield "Of copies with different labels at least one label is wrong: look at them before anything else."


def _number(number: int, one: str, several: str) -> str:
    return f"{number:,} {one if number == 1 else several}"
