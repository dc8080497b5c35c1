"""The README of an exported network, as the Hugging Face Hub shows it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shike_fast import methods
from shike_fast.data.shots import SHOTS

CARD = "README.md"
CONFIG = "config.json"

_MARK = "library_name: shike_fast"
_MOST_NAMES = 50  # of classes that are listed
_TOLD = ("epochs", "batch_size", "lr", "weight_decay", "augmentation", "imbalance_factor", "pretrained", "amp", "seed")
_CAUTION = (
    "The epoch with the highest accuracy was chosen on the test images, as the field reports it; the last epoch's "
    "figures are the ones to compare methods by."
)


def is_card(path: Path) -> bool:
    """Whether the file at ``path`` was written by this module."""
    return _MARK.encode() in path.read_bytes()


def model_card(metadata: Mapping[str, Any]) -> str:
    """Markdown with the front matter that the Hub reads.

    Args:
        metadata: what :func:`shike_fast.engine.exported.metadata_of` says.
    """
    config, data, names = metadata["config"], metadata["data"], metadata["class_names"]
    counts = metadata["class_counts"]
    method = methods.find_method(config["method"])
    title = f"{metadata['model']['name']} trained by {method.name}" + (f" on {data['name']}" if data["name"] else "")
    parts = [_front_matter(metadata, title), f"# {title}"]
    source = f"; {method.source}" if method.source else ""
    parts.append(
        f"An image classifier of {len(names)} classes with {metadata['model']['num_experts']} experts on one network. "
        f"Method: {method.summary}{source}. Written by shike_fast {metadata['shike_fast']}."
    )
    parts.append(_USE.format(weights="REPOSITORY"))
    transform = metadata["transform"]
    parts.append(
        f"Images: RGB, the short side resized to {transform['resized']} pixels (bilinear, antialiased), the central "
        f"{transform['size']}x{transform['size']} cut out, divided by 255, less the mean "
        f"{_numbers(transform['mean'])}, over the standard deviation {_numbers(transform['std'])}."
    )
    if metadata["best"] or metadata["last"]:
        parts += ["## Test accuracy", _accuracy(metadata)]
    parts.append("## Training")
    if any(count > 1 for count in counts):
        parts.append(
            f"{sum(counts):,} images, {max(counts):,} of the largest class and {min(counts):,} of the smallest."
        )
    settings = [f"| {name} | {config[name]} |" for name in _TOLD if name in config]
    parts.append("\n".join(["| setting | value |", "|---|---|", *settings]))
    listed = ", ".join(names[:_MOST_NAMES])
    more = f" and {len(names) - _MOST_NAMES:,} more, in `{CONFIG}`" if len(names) > _MOST_NAMES else ""
    parts += ["## Classes", f"{listed}{more}."]
    return "\n\n".join(parts) + "\n"


_USE = """```python
import shike_fast

model = shike_fast.load("{weights}")  # a folder with model.safetensors
model.predict(["photo.jpg"]).top(5)
```"""


def _front_matter(metadata: Mapping[str, Any], title: str) -> str:
    lines = [_MARK, "pipeline_tag: image-classification", "tags:"]
    lines += [f"- {tag}" for tag in ("long-tailed-recognition", "mixture-of-experts", metadata["config"]["method"])]
    best = metadata["best"] or metadata["last"]
    if best and metadata["data"]["name"]:
        name, value = json.dumps(metadata["data"]["name"]), round(best["top1"] / 100, 4)
        lines += [
            "model-index:",
            f"- name: {json.dumps(title)}",
            "  results:",
            "  - task:",
            "      type: image-classification",
            "    dataset:",
            f"      name: {name}",
            f"      type: {name}",
            "    metrics:",
            "    - type: accuracy",
            f"      value: {value}",
        ]
    return "\n".join(["---", *lines, "---"])


def _accuracy(metadata: Mapping[str, Any]) -> str:
    """A table of the epochs that are known, in percent."""
    lines = [f"| epoch | top-1 | {' | '.join(SHOTS)} |", "|---" * (2 + len(SHOTS)) + "|"]
    rows = {"best": metadata["best"], "last": metadata["last"]}
    for label, row in rows.items():
        if row:
            cells = ["" if row[name] is None else f"{row[name]:.2f}" for name in ("top1", *SHOTS)]
            lines.append(f"| {label}, {row['epoch']} | {' | '.join(cells)} |")
    return "\n".join([*lines, *(["", _CAUTION] if metadata["best"] else [])])


def _numbers(values: list[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
