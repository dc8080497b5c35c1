"""A description of a data set as lines for a terminal."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from shike_fast._util.text import printable
from shike_fast.data.description.describe import FINDINGS, Description
from shike_fast.data.description.duplicates import Copy
from shike_fast.data.description.sizes import ClassSizes, ShotBands
from shike_fast.data.description.unnamed import UnnamedFiles
from shike_fast.data.shots import SHOTS

SHOWN = 5  # of the findings of a kind

_MOST_CLASSES = 20  # that are all shown; of more, the largest and the smallest
_ENDS = 8  # so many of each
_WIDTH = 22  # of the column of names
_WIDEST = 60  # of that of the classes' names
_MOST_COPIES = 3  # of an image in a line
_ENDINGS = 6


def as_text(description: Description, *, everything: bool = False, compared: bool = True) -> str:
    """The description, a line for each figure, class and finding.

    Args:
        description: of a data set.
        everything: all classes and findings, not just the first.
        compared: images were compared, if they can be.
    """
    lines = [shown(description.name)]
    lines += [f"  {name:<{_WIDTH}} {figure}" for name, figure in figures(description)]
    lines += [*_classes(description, everything), *_findings(description, everything, compared)]
    return "\n".join([*lines, "what to do", *(f"  {sentence}" for sentence in description.advice)])


def figures(description: Description) -> Iterator[tuple[str, str]]:
    """The figures of a data set, each with its name."""
    sizes = description.sizes
    train, test = sum(description.train_counts), sum(description.test_counts)
    yield "classes", f"{len(description.class_names):,}"
    yield "training images", f"{train:,}; of a class: {_spread(sizes)}"
    tests = [count for count in description.test_counts if count]
    yield "test images", f"{test:,}; of a class: {_spread(ClassSizes.of(tests))}" if tests else "none"
    yield "imbalance factor", f"{number(sizes.imbalance_factor)}, the largest class over the smallest"
    yield "Gini coefficient", f"{sizes.gini:.3f}; 0: all classes of one size, near 1: one class has nearly all images"
    yield "effective classes", f"{number(sizes.effective_classes)} of {len(description.sized):,}, by entropy"
    largest = "the largest class" if sizes.head_classes == 1 else f"the {sizes.head_classes:,} largest classes"
    yield "largest 10 %", f"{100 * sizes.head_share:.1f} % of the training images are in {largest}"
    yield " / ".join(SHOTS), _bands(ShotBands(), description)
    if description.suggested_bands is not None:
        yield "suggested instead", f"{_bands(description.suggested_bands, description)}, by thirds of the classes"


def number(value: float) -> str:
    """A number of images or classes, with one decimal if it has any."""
    return f"{value:,.1f}".removesuffix(".0")


def _spread(sizes: ClassSizes) -> str:
    if sizes.largest == sizes.smallest:
        return f"{sizes.largest:,}"
    return f"{sizes.largest:,} at most, {number(sizes.median)} in the median, {sizes.smallest:,} at least"


def _bands(bands: ShotBands, description: Description) -> str:
    numbers = " / ".join(f"{count:,}" for count in bands.classes(description.train_counts).values())
    return f"{numbers} classes: more than {bands.many_above:,} training images, between, fewer than {bands.few_below:,}"


def class_rows(description: Description) -> list[tuple[str, str, str, str]]:
    """Name, training images, test images and shot of each class, by falling number of training images."""
    bands = description.suggested_bands or ShotBands()
    rows = []
    for label in description.by_size:
        count = description.train_counts[label]
        shot = bands.shot(count) if count else "–"
        name = shown(description.class_names[label])
        rows.append((name, f"{count:,}", f"{description.test_counts[label]:,}", shot))
    return rows


def _classes(description: Description, everything: bool) -> Iterator[str]:
    rows = class_rows(description)
    short = len(rows) > _MOST_CLASSES and not everything
    chosen = [*rows[:_ENDS], *rows[-_ENDS:]] if short else rows
    width = min(_WIDEST, max(_WIDTH, *(len(row[0]) for row in chosen)))
    yield f"  {'class':<{width}} {'training':>9} {'test':>9}  shot"
    for place, (name, train, test, shot) in enumerate(chosen):
        if short and place == _ENDS:
            yield f"  … {len(rows) - 2 * _ENDS:,} more; --all shows them"
        yield f"  {name:<{width}} {train:>9} {test:>9}  {shot}"


def _findings(description: Description, everything: bool, compared: bool) -> Iterator[str]:
    unnamed, duplicates = description.unnamed, description.duplicates
    for name, count in description.findings.items():
        if count is None:
            why = "cannot be found out" if compared or name == "unlabelled" else "images are not compared"
            yield f"  {name:<{_WIDTH}} –  ({FINDINGS[name]}: {why})"
            continue
        yield f"  {name:<{_WIDTH}} {count:,}  ({FINDINGS[name]})"
        lines = examples(description, name)
        yield from _some(lines, everything, count - len(lines) if name == "unlabelled" else 0)
    if duplicates is not None and duplicates.unreadable:
        what = "images that are missing, empty or unreadable; python -m shike_fast.data check names them"
        yield f"  {'not compared':<{_WIDTH}} {duplicates.unreadable:,}  ({what})"
    if unnamed is not None:
        yield f"  {'other files':<{_WIDTH}} {unnamed.others:,}  (no images by their endings{_endings(unnamed)})"
        yield from _some([shown(n) for n in unnamed.other_names], everything, unnamed.others - len(unnamed.other_names))
        for folder in unnamed.closed:
            yield f"  {'cannot be listed':<{_WIDTH}} {shown(folder)}"


def _endings(unnamed: UnnamedFiles) -> str:
    kinds = [f"{shown(ending) or 'none'} {n:,}" for ending, n in [*unnamed.other_endings.items()][:_ENDINGS]]
    return f": {', '.join(kinds)}" if kinds else ""


def _some(lines: Sequence[str], everything: bool, nameless: int = 0) -> Iterator[str]:
    """The first lines, or all, and how many are not shown: of these, ``nameless`` cannot be."""
    first = lines if everything else lines[:SHOWN]
    yield from (f"    {line}" for line in first)
    rest = len(lines) - len(first) + nameless
    if rest:
        yield f"    … {rest:,} more{'' if len(lines) == len(first) else '; --all shows more'}"


def examples(description: Description, finding: str) -> list[str]:
    """A line for each thing of a kind of :data:`FINDINGS` that was found, as far as it is known by name."""
    names = description.class_names
    if finding == "one-sided":
        missing = [(label, "no test image") for label in description.training_only]
        missing += [(label, "no training image") for label in description.test_only]
        missing += [(label, "no image") for label in description.absent]
        return [f"{shown(names[label])}: {what}" for label, what in missing]
    if finding == "single":
        return [shown(names[label]) for label in description.single]
    if finding == "names":
        return [", ".join(f"'{shown(names[label])}'" for label in group) for group in description.similar_names]
    if finding == "unlabelled":
        return [] if description.unnamed is None else [shown(name) for name in description.unnamed.image_names]
    duplicates = description.duplicates
    if duplicates is None:
        return []
    groups = {"contradictions": duplicates.contradictory, "leakage": duplicates.leaking}.get(
        finding, duplicates.repeated
    )
    return [_group(description, group) for group in groups]


def _group(description: Description, group: Sequence[Copy]) -> str:
    top = None if description.unnamed is None else description.unnamed.folder
    copies = [_copy(copy, description.class_names, top) for copy in group[:_MOST_COPIES]]
    more = f" and {len(group) - _MOST_COPIES:,} more" if len(group) > _MOST_COPIES else ""
    return " = ".join(copies) + more


def _copy(copy: Copy, names: Sequence[str], top: str | None) -> str:
    path = os.path.abspath(copy.name)
    name = os.path.relpath(path, top) if top is not None and path.startswith(top + os.sep) else copy.name
    return f"{shown(name)} ({shown(names[copy.label])})"


def shown(name: str) -> str:
    """A name, of a class or a file, as one line: what is not UTF-8, or not visible, becomes an escape sequence."""
    return printable(name.encode("utf-8", "surrogateescape"))
