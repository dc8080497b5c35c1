"""The training settings that a data set brings along."""

from __future__ import annotations

from typing import Any

from shike_fast.data.types import DatasetInfo

_DEFAULTS: dict[str, Any] = {
    "hardest_weight": 10.0,
    "mutual_weight": 1.0,
    "scale": 30.0,
    "threads": None,  # torch's own number, one a core
    "warmup_epochs": 5,  # of either stage, shortened where a stage is short
    "stage2_start_lr_factor": 0.25,  # stage 2 warms up from this fraction of stage2_lr, stage 1 from zero
    "needs_pretrained": False,  # begins with ImageNet weights
}


def recipe_of(info: DatasetInfo) -> dict[str, Any]:
    """The recipe of a registered data set, with a default for each setting that it leaves out."""
    return _DEFAULTS | dict(info.recipe)
