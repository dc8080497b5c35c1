"""What the loaders of image files say of themselves: their speed, and the images that they could not read."""

from __future__ import annotations

from typing import Any

import torch

from shike_fast.data.loaders.loader import EpochLoader
from shike_fast.engine.distributed import Processes


def loader_metrics(train: EpochLoader, test: EpochLoader, processes: Processes, device: torch.device) -> dict[str, Any]:
    """What an epoch's metrics say of the loaders, over all processes; nothing where images are in memory.

    Returns:
        ``loader_images_per_second``, what the training loader can deliver if nobody makes it wait, and
        ``unreadable_images``, how many files of either part could not be read since this process began.
    """
    found = [loader.broken for loader in (train, test) if loader.broken is not None]
    if not found:
        return {}
    speed = torch.tensor(train.images_per_second or 0.0, dtype=torch.float64, device=device)
    # In time every process meets the same files.
    broken = sum(len(set().union(*processes.gather(sorted(images.messages)))) for images in found)
    return {"loader_images_per_second": float(processes.total(speed)), "unreadable_images": broken}


def speed_note(row: dict[str, Any]) -> str | None:
    """One line on the loaders' speed beside that of training; None where images are in memory."""
    if "loader_images_per_second" not in row:
        return None
    loading, training = row["loader_images_per_second"], row["images_per_second"]
    note = f"loader: {loading:,.0f} images/s; training took {training:,.0f}"
    if 0 < loading < 1.1 * training:
        note += "; training waits for it: pack the data set (python -m shike_fast.data pack), or more --workers"
    return note
