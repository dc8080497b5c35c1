"""What every exported file says of its network, and weights in ``safetensors``, which this package reads again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from shike_fast._version import __version__
from shike_fast.data.images.prepared import ImageTransform
from shike_fast.engine.checkpoint import FORMAT
from shike_fast.errors import CheckpointError

KEY = "shike_fast"  # of the metadata
SUFFIX = ".safetensors"
WEIGHTS = f"model{SUFFIX}"  # in a folder

_METHOD_STATE = "method_state/"  # before the names of a method's tensors
_PRIVATE = ("data_dir", "pretrained", "device", "workers", "threads")  # settings that say where a run took place
_OF_THE_DATA = ("name", "fingerprint", "imbalance_factor", "class_names", "in_channels", "image_size", "mean", "std")


def metadata_of(state: Mapping[str, Any], transform: ImageTransform, stage: int) -> dict[str, Any]:
    """What every format says of the network, in plain values.

    Args:
        state: the model part of a checkpoint.
        transform: of its images.
        stage: of the method, which the file is to be used with.
    """
    data = {name: state["data"].get(name) for name in _OF_THE_DATA} | {"margin": transform.margin}
    return {
        "shike_fast": __version__,
        "class_names": state["data"]["class_names"],
        "class_counts": state["data"]["class_counts"].tolist(),
        "input": {
            "name": "pixels",
            "dtype": "uint8",
            "shape": ["batch", 3, transform.size, transform.size],
            "from": f"RGB; the short side resized to {transform.resized} (bilinear, antialiased), the centre cut out",
        },
        "output": {"name": "probabilities", "dtype": "float32", "shape": ["batch", len(state["data"]["class_names"])]},
        "transform": transform.describe(),
        "stage": stage,
        "epoch": state["epoch"],
        "best": state.get("best"),
        "last": state["history"][-1] if state.get("history") else None,
        "data": data,
        "model": state["model_description"],
        "config": {name: value for name, value in state["config"].items() if name not in _PRIVATE} | {"ema": 0.0},
    }


def weights_of(state: Mapping[str, Any], metadata: Mapping[str, Any]) -> bytes:
    """The content of a ``safetensors`` file: the network's tensors by their names, and the metadata."""
    tensors = {name: tensor.contiguous().clone() for name, tensor in state["model"].items()}
    plain: dict[str, Any] = {}
    for name, value in state.get("method_state", {}).items():
        if isinstance(value, Tensor):
            tensors[_METHOD_STATE + name] = value.contiguous().clone()
        else:
            plain[name] = value
    described = json.dumps(dict(metadata) | {"method_state": plain})
    return safetensors.torch.save(tensors, metadata={"format": "pt", KEY: described})


def exported_weights(source: Path) -> Path | None:
    """The ``safetensors`` file of this library that ``source`` is, or, if it is a folder, holds; None for any other."""
    path = source / WEIGHTS if source.is_dir() else source
    if path.suffix != SUFFIX or not path.is_file():
        return None
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return path if KEY in (file.metadata() or {}) else None
    except (OSError, safetensors.SafetensorError):
        return None  # which the reader of other weights reports


def read_exported(path: Path) -> dict[str, Any]:
    """The model part of a checkpoint, from what :func:`weights_of` wrote.

    Raises:
        CheckpointError: the metadata is not what it should be.
    """
    with safetensors.safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dictionary)
        described = file.metadata()[KEY]
    own = {name: tensors.pop(name) for name in [*tensors] if name.startswith(_METHOD_STATE)}
    try:
        metadata = json.loads(described)
        state = {
            "format": FORMAT,
            "config": _config_from(metadata["config"]),
            "data": metadata["data"] | {"class_counts": torch.tensor(metadata["class_counts"])},
            "model_description": metadata["model"],
            "model": tensors,
            "stage": metadata["stage"],
            "epoch": metadata["epoch"],
            "best": metadata["best"],
            "history": [metadata["last"]] if metadata["last"] else [],
        }
        method_state = metadata["method_state"] | {name.removeprefix(_METHOD_STATE): own[name] for name in own}
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: what it says of its network cannot be read ({error!r})") from error
    return state | ({"method_state": method_state} if method_state else {})


def _config_from(stored: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run as a checkpoint has them: JSON knows no tuples, and some were left out."""
    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()}
    return dict.fromkeys(_PRIVATE) | {"threads": torch.get_num_threads()} | settings
