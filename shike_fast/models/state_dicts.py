"""State_dicts of others: what they must be, and what they hold that a network does not."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from shike_fast.errors import CheckpointError

_LISTED = 20  # keys named in one message; a wrong network differs in hundreds


def saved_tensors(saved: object, source: str) -> dict[str, Tensor]:
    """:func:`plain_tensors` of a state_dict, or of what a training script saves: a dict with a ``state_dict``."""
    inner = saved.get("state_dict") if isinstance(saved, Mapping) else None
    return plain_tensors(inner if inner and isinstance(inner, Mapping) else saved, source)


def plain_tensors(state_dict: object, source: str) -> dict[str, Tensor]:
    """``state_dict`` as tensors by name, without the ``module.`` that DataParallel puts before every key.

    Raises:
        CheckpointError: it is not a mapping of names to tensors, or empty.
    """
    if not isinstance(state_dict, Mapping) or not state_dict:
        raise CheckpointError(f"{source}: expected a state_dict (names to tensors), got {_kind(state_dict)}")
    others = [f"{key!r} is {_kind(value)}" for key, value in state_dict.items() if not _is_entry(key, value)]
    if others:
        raise CheckpointError(f"{source}: expected a state_dict (names to tensors), but {shorten(others)}")
    return without_prefix(state_dict, "module.")


def without_prefix(state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """A new dict, without the prefix where all names have it."""
    if all(key.startswith(prefix) for key in state_dict):
        return {key.removeprefix(prefix): value for key, value in state_dict.items()}
    return dict(state_dict)


def check_fit(given: Mapping[str, Tensor], expected: Mapping[str, Any], missing_ok: Iterable[str], source: str) -> None:
    """Check names and shapes of ``given`` against ``expected`` (shapes by name); keys of ``missing_ok`` may be absent.

    Raises:
        CheckpointError: lists missing keys, unknown keys and wrong shapes.
    """
    missing = expected.keys() - given.keys() - set(missing_ok)
    unknown = given.keys() - expected.keys()
    wrong = [
        f"{key} is {list(tensor.shape)}, expected {list(expected[key])}"
        for key, tensor in given.items()
        if key in expected and tuple(tensor.shape) != tuple(expected[key])
    ]
    problems = [
        f"{title}: {shorten(items)}"
        for title, items in (
            ("missing keys", sorted(missing)),
            ("unknown keys", sorted(unknown)),
            ("wrong shapes", wrong),
        )
        if items
    ]
    if problems:
        raise CheckpointError(f"{source}: weights of another network; {'; '.join(problems)}")


def count(given: Mapping[str, Tensor], pattern: str) -> int:
    """How many different numbers stand at the group of the pattern: with a gap, check_fit names what is missing."""
    return max(1, len({match[1] for key in given if (match := re.match(pattern, key))}))


def shorten(items: list[str]) -> str:
    """The items in a row, the first of them if they are many."""
    more = len(items) - _LISTED
    return ", ".join(items[:_LISTED]) + (f" and {more} more" if more > 0 else "")


def _is_entry(key: object, value: object) -> bool:
    return isinstance(key, str) and isinstance(value, Tensor)


def _kind(value: object) -> str:
    if isinstance(value, Mapping):
        return "a dict" if value else "an empty dict"
    return f"of type {type(value).__name__}"
