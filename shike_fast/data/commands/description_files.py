"""The files in which a description of a data set is kept: JSON, a page, a picture."""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shike_fast._util.page import DESCRIPTION, page, section, table
from shike_fast._util.pictures import SHOT_COLOURS, name_numbers, picture, subplots
from shike_fast._version import __version__
from shike_fast.data.commands.description_text import class_rows, examples, figures, number, shown
from shike_fast.data.description.describe import FINDINGS, Description
from shike_fast.data.description.duplicates import Copy
from shike_fast.data.description.sizes import ShotBands
from shike_fast.data.description.unnamed import UnnamedFiles
from shike_fast.data.shots import SHOTS

FORMS = ("png", "svg")  # of pictures

_BEGIN = b'{\n  "description_of":'
_MOST_NAMES = 20  # classes that are named below the axis
_MOST_LETTERS = 16  # of a name there
_UPRIGHT = 3  # letters of the longest name that need no slanting
_MOST_LINES = 20  # findings of a kind on the page
_PAGE_DPI = 160


def as_json(description: Description) -> bytes:
    """All figures, classes and findings as a JSON object. Names that are not UTF-8 have escape sequences."""
    bands = description.suggested_bands
    duplicates = description.duplicates
    content: dict[str, Any] = {
        "description_of": shown(description.name),
        "version": __version__,
        "classes": len(description.class_names),
        "training_images": sum(description.train_counts),
        "test_images": sum(description.test_counts),
        **dataclasses.asdict(description.sizes),
        "shots": _bands(ShotBands(), description),
        "suggested_shots": None if bands is None else _bands(bands, description),
        "findings": description.findings,
        "training_only": description.training_only,
        "test_only": description.test_only,
        "absent": description.absent,
        "single": description.single,
        "similar_names": description.similar_names,
        "duplicates": None if duplicates is None else [[_copy(one) for one in group] for group in duplicates.groups],
        "not_compared": None if duplicates is None else duplicates.unreadable,
        "unnamed_files": None if description.unnamed is None else _unnamed(description.unnamed),
        "advice": description.advice,
        "class_sizes": [
            {"class": label, "name": shown(name), "training": training, "test": test}
            for label, (name, training, test) in enumerate(
                zip(description.class_names, description.train_counts, description.test_counts, strict=True)
            )
        ],
    }
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def is_json(path: Path) -> bool:
    """Whether the file at ``path`` holds what :func:`as_json` gave."""
    with open(path, "rb") as file:
        return file.read(len(_BEGIN)) == _BEGIN


def _bands(bands: ShotBands, description: Description) -> dict[str, Any]:
    return dataclasses.asdict(bands) | {"classes": bands.classes(description.train_counts)}


def _copy(copy: Copy) -> dict[str, Any]:
    return dataclasses.asdict(copy) | {"name": shown(copy.name)}


def _unnamed(unnamed: UnnamedFiles) -> dict[str, Any]:
    return {
        "folder": shown(unnamed.folder),
        "images": unnamed.images,
        "image_names": [shown(name) for name in unnamed.image_names],
        "image_folders": {shown(name): count for name, count in unnamed.image_folders.items()},
        "others": unnamed.others,
        "other_names": [shown(name) for name in unnamed.other_names],
        "other_endings": {shown(ending): count for ending, count in unnamed.other_endings.items()},
        "closed": [shown(name) for name in unnamed.closed],
    }


def as_page(description: Description) -> str:
    """The description as one HTML file, with the picture in it."""
    sizes = description.sizes
    image = base64.b64encode(as_picture(description, "png", dpi=_PAGE_DPI)).decode()
    tiles = [
        ("classes", f"{len(description.class_names):,}"),
        ("training images", f"{sum(description.train_counts):,}"),
        ("test images", f"{sum(description.test_counts):,}"),
        ("imbalance factor", number(sizes.imbalance_factor)),
        ("Gini coefficient", f"{sizes.gini:.3f}"),
        ("effective classes", number(sizes.effective_classes)),
        *((FINDINGS[name], f"{count:,}") for name, count in description.findings.items() if count),
    ]
    found = []
    for name, count in description.findings.items():
        if count:
            lines = [(line,) for line in examples(description, name)[:_MOST_LINES]]
            found.append(section(f"{FINDINGS[name]}: {count:,}", table(("the first of them",), lines, "texts")))
    sections = [
        section("Sizes of the classes", f'<img alt="sizes of the classes" src="data:image/png;base64,{image}">'),
        section("Figures", table(("figure", ""), figures(description), "texts")),
        *found,
        section("Classes", table(("class", "training images", "test images", "shot"), class_rows(description))),
    ]
    return page(DESCRIPTION, shown(description.name), description.advice, tiles, sections)


def as_picture(description: Description, form: str, *, dpi: int = 120) -> bytes:
    """The sizes of the classes, the largest first, in the colours of their shots, and their test images."""
    figure, (axes,) = subplots(1, width=8.0, height=4.6)
    order = description.by_size
    few = len(order) <= _MOST_NAMES
    sizes = [description.train_counts[label] for label in order]
    tests = [description.test_counts[label] for label in order]
    bands = description.suggested_bands or ShotBands()
    bottom, top = min(filter(None, (*sizes, *tests))) / 1.6, max(*sizes, *tests) * 1.5
    axes.set_yscale("log")
    axes.set_ylim(bottom, top)
    axes.set_xlim(-0.5 - 0.01 * len(order), len(order) - 0.5 + 0.01 * len(order))
    name_numbers(axes.yaxis, bottom, top)
    axes.set_axisbelow(True)
    _draw_sizes(axes, sizes, bands, bottom, few)
    _draw_borders(axes, bands, bottom, top)
    marker = {"marker": "_", "markersize": 18, "markeredgewidth": 2} if few else {"marker": ".", "markersize": 2}
    points = [(rank, count) for rank, count in enumerate(tests) if count]
    if points:
        marks = {"linestyle": "", "color": "black", "zorder": 3, "rasterized": not few} | marker
        axes.plot(*zip(*points, strict=True), label="test images", **marks)
    if few:
        names = [_short(description.class_names[label]) for label in order]
        slant = {} if max(map(len, names)) <= _UPRIGHT else {"rotation": 30, "ha": "right", "rotation_mode": "anchor"}
        axes.set_xticks(range(len(order)), names, parse_math=False, **slant)
        axes.grid(axis="x", visible=False)
    axes.set_xlabel("classes, by falling number of training images")
    axes.set_ylabel("images of the class")
    factor, gini = number(description.sizes.imbalance_factor), f"{description.sizes.gini:.3f}"
    axes.set_title(f"{shown(description.name)}: imbalance factor {factor}, Gini {gini}", parse_math=False)
    keys, texts = axes.get_legend_handles_labels()
    entries = sorted(zip(keys, texts, strict=True), key=lambda entry: entry[1] == "test images")  # these last
    legend = {"ncols": len(SHOTS) + 1, "frameon": False, "markerscale": 0.5 if few else 4}
    figure.legend(*zip(*entries, strict=True), loc="outside lower center", **legend)
    return picture(figure, form, dpi)


def _draw_sizes(axes: Any, sizes: Sequence[int], bands: ShotBands, bottom: float, few: bool) -> None:
    """A bar for each of a few classes, an area for each shot of many."""
    for shot in SHOTS:
        ranks = [rank for rank, size in enumerate(sizes) if size and bands.shot(size) == shot]
        if not ranks:
            continue
        heights = [sizes[rank] for rank in ranks]
        label = f"{shot}: {len(ranks):,} {'class' if len(ranks) == 1 else 'classes'}"
        if few:
            axes.bar(ranks, heights, color=SHOT_COLOURS[shot], label=label, zorder=2)
        else:
            edges = [ranks[0] - 0.5, *(rank + 0.5 for rank in ranks)]
            axes.stairs(heights, edges, baseline=bottom, fill=True, color=SHOT_COLOURS[shot], label=label)


def _draw_borders(axes: Any, bands: ShotBands, bottom: float, top: float) -> None:
    box = {"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 1}
    place = {"xycoords": ("axes fraction", "data"), "xytext": (-4, 3), "textcoords": "offset points", "ha": "right"}
    for value, text in _borders(bands).items():
        if bottom < value < top:
            axes.axhline(value, color="gray", linestyle="--", linewidth=1, zorder=1.5)
            axes.annotate(text, (1, value), fontsize=8, color="dimgray", bbox=box, zorder=2.5, **place)


def _borders(bands: ShotBands) -> dict[int, str]:
    """The thresholds, and what is written there."""
    kind = "" if bands == ShotBands() else "suggested: "
    many, few = f"many above {bands.many_above:,}", f"few below {bands.few_below:,}"
    if bands.many_above == bands.few_below:
        return {bands.many_above: f"{kind}{many}, {few}"}
    return {bands.many_above: f"{kind}{many}", bands.few_below: f"{kind}{few}"}


def _short(name: str) -> str:
    name = shown(name)
    return name if len(name) <= _MOST_LETTERS else f"{name[: _MOST_LETTERS - 1]}…"
