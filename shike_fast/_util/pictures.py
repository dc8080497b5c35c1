"""Pictures drawn by matplotlib, which is imported when the first one is drawn."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

from shike_fast._util.files import atomic_write

SHOT_COLOURS = {"many": "tab:blue", "medium": "tab:orange", "few": "tab:red"}

_MAKER = "shike_fast"
_MAKER_WITHIN = 4096  # bytes of a picture that name its maker
_METADATA: dict[str, dict[str, Any]] = {"png": {"Software": _MAKER}, "svg": {"Creator": _MAKER, "Date": None}}
_WIDE, _WIDEST = 6, 2000  # between these ratios of an axis's ends, 1, 2 and 5 of every decade are named; then only 1


def subplots(columns: int, width: float = 6.4, height: float = 4.4) -> Any:
    """A figure, and a list of the axes beside each other in it, each of a size in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display and without touching the user's matplotlib state
    axes = [figure.add_subplot(1, columns, column + 1) for column in range(columns)]
    for one in axes:
        one.grid(alpha=0.3)
    return figure, axes


def name_numbers(axis: Any, low: float, high: float) -> None:
    """Let a logarithmic axis between two numbers name plain numbers, not powers of ten, as many as there is room."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    numbers = FuncFormatter(lambda number, _: f"{number:.10g}")
    axis.set_major_formatter(numbers)
    axis.set_minor_formatter(NullFormatter() if high > _WIDE * low else numbers)
    if _WIDE * low < high < _WIDEST * low:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))


def picture(figure: Any, form: str = "png", dpi: int = 120) -> bytes:
    """A figure as a file of the form ``png`` or ``svg``; the same figure gives the same bytes."""
    from matplotlib import rc_context

    image = io.BytesIO()
    with warnings.catch_warnings(), rc_context({"svg.hashsalt": _MAKER, "svg.fonttype": "none"}):
        # a class name in a script that the font lacks is drawn as boxes
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(image, format=form, dpi=dpi, metadata=_METADATA[form])
    return image.getvalue()


def save(figure: Any, path: Path) -> None:
    """Write a figure as PNG."""
    atomic_write(path, picture(figure))


def is_picture(path: Path) -> bool:
    """Whether the file at ``path`` is a picture that :func:`picture` made."""
    with open(path, "rb") as file:
        return _MAKER.encode() in file.read(_MAKER_WITHIN)
