"""How many instructions the main loop of a kernel executes where nothing rare happens, from its machine code."""

import re
from collections.abc import Iterable
from typing import NamedTuple


class Work(NamedTuple):
    """What a turn of the loop has to contain: instructions of these kinds."""

    exponentials: int = 0
    loads: int = 0  # of 8 or 16 bytes from global memory
    stores: int = 0
    shared: int = 0  # accesses of 8 or 16 bytes


_KINDS = (
    re.compile(r"\bMUFU\.EX2\b"),
    re.compile(r"\bLDG\.E\.(128|64)\b"),
    re.compile(r"\bSTG\.E\.(128|64)\b"),
    re.compile(r"\b(LDS|STS)\.(128|64)\b"),
)
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);")
_BRANCH = re.compile(r"\bBRA(?:\.\w+)*\s.*?(0x[0-9a-f]+)")
_CONDITION = re.compile(r"^@!?U?P|\bBRA\S*\s+!?U?P\d")


def turn_of_loop(code: str, work: Work) -> int:
    """Instructions of the shortest way around a loop of ``code`` that does this work, at least.

    A way around begins at the target of a branch that leads backwards, and ends with it; branches on the way may be
    taken or not.
    """
    program = [(int(address, 16), text) for address, text in _INSTRUCTION.findall(code)]
    places = {address: i for i, (address, _) in enumerate(program)}
    turns: list[int] = []
    for end, (address, text) in enumerate(program):
        target = _target(text)
        if target is not None and target <= address and target in places:
            turns += _shortest(program, places, places[target], end, work)
    assert turns, f"no loop does {work}"
    return min(turns)


def _target(text: str) -> int | None:
    match = _BRANCH.search(text)
    return int(match[1], 16) if match and "BRA.DIV" not in text else None


def _shortest(
    program: list[tuple[int, str]], places: dict[int, int], start: int, end: int, work: Work
) -> Iterable[int]:
    """The number of instructions from start to end, for the way that does the work; nothing if there is none."""
    known: dict[int, dict[tuple[int, ...], int]] = {start: {(0,) * len(work): 0}}  # work done -> instructions so far
    for i in range(start, end + 1):
        address, text = program[i]
        done = {}
        for before, count in known.pop(i, {}).items():
            after = tuple(
                min(most, number + bool(kind.search(text)))
                for most, number, kind in zip(work, before, _KINDS, strict=True)
            )
            done[after] = min(done.get(after, count + 1), count + 1)
        if i == end:
            return [done[tuple(work)]] if tuple(work) in done else []
        target, conditional = _target(text), bool(_CONDITION.search(text))
        following = [i + 1] if conditional or (target is None and "EXIT" not in text) else []
        if target is not None and target > address and places.get(target, end + 1) <= end:
            following.append(places[target])
        for place in following:
            best = known.setdefault(place, {})
            for key, count in done.items():
                best[key] = min(best.get(key, count), count)
    return []
