"""Class names that are hard to tell apart."""

import unicodedata
from collections import defaultdict
from collections.abc import Sequence


def similar_names(names: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """The classes whose names differ by case, spaces or the form of their Unicode letters alone, or not at all.

    Args:
        names: one a class.

    Returns:
        Groups of classes, by number.
    """
    groups = defaultdict[str, list[int]](list)
    for label, name in enumerate(names):
        groups["".join(unicodedata.normalize("NFKC", name).casefold().split())].append(label)
    return tuple(tuple(group) for group in groups.values() if len(group) > 1)
