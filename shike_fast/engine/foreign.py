"""Weights of elsewhere as a checkpoint: the published code's, and plain networks in torchvision's names."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shike_fast._version import __version__
from shike_fast.data import LongTailData, load_dataset
from shike_fast.data.datasets.cifar import MEAN, STD
from shike_fast.data.datasets.layouts import numbered_names
from shike_fast.data.images.transforms import IMAGENET_MEAN, IMAGENET_STD, MARGIN
from shike_fast.engine.checkpoint import FORMAT
from shike_fast.engine.config import resolve
from shike_fast.engine.state import data_description
from shike_fast.errors import CheckpointError, ConfigError, warn
from shike_fast.models.recognise import READABLE, Recognised, recognise
from shike_fast.models.weights import read_weights

_METHODS = {"shike": "shike", "ride": "ride", "plain": "ce"}
_SMALL_STEM = 3  # side of the first convolution of networks for CIFAR


@dataclass(frozen=True)
class ForeignData:
    """What a command says of the data set that weights of elsewhere are used on."""

    dataset: str | None
    data_dir: str | None
    imbalance_factor: float | None

    @staticmethod
    def add_options(parser: argparse.ArgumentParser) -> None:
        """Add the options, but ``--data-dir`` where the command has it already."""
        of = "for weights of elsewhere: "
        add = parser.add_argument
        add("--dataset", metavar="NAME", help=f"{of}the data set that has their class names and transform")
        add("--imbalance-factor", type=float, metavar="IF", help=f"{of}that of its training images")
        if "--data-dir" not in parser._option_string_actions:
            add("--data-dir", metavar="DIR", help=f"{of}where that data set lies")

    @classmethod
    def of(cls, arguments: dict[str, Any]) -> ForeignData:
        """From a parsed command line."""
        return cls(*(arguments.get(name) for name in ("dataset", "data_dir", "imbalance_factor")))

    def load(self) -> LongTailData | None:
        """The data set; None where none is named."""
        if self.dataset is None:
            if self.imbalance_factor is not None:
                raise ConfigError("--imbalance-factor: of which data set? name it by --dataset")
            return None
        return load_dataset(self.dataset, data_dir=self.data_dir, imbalance_factor=self.imbalance_factor)


def state_of_weights(source: Path, dataset: LongTailData | None, refusal: CheckpointError) -> dict[str, Any] | None:
    """Weights of elsewhere as the model part of a checkpoint.

    Args:
        source: the file.
        dataset: what they are used on; None where nobody says, in which case classes have numbers for names and images
            are transformed as CIFAR's or ImageNet's are.
        refusal: why it is no checkpoint of this library.

    Returns:
        The state; None if the file cannot be read, or is a checkpoint all the same.

    Raises:
        CheckpointError: they are of no network that is known here.
    """
    try:
        saved = read_weights(source)
    except CheckpointError:
        return None
    if isinstance(saved, dict) and "format" in saved:
        return None
    try:
        found = recognise(saved, str(source))
    except CheckpointError as error:
        raise CheckpointError(f"{refusal}; {READABLE} are read as well, but {error}") from error
    return _as_state(found, source, dataset)


def _as_state(found: Recognised, source: Path, dataset: LongTailData | None) -> dict[str, Any]:
    description = found.description
    classes = description["num_classes"]
    small = found.state_dict["conv1.weight"].shape[-1] == _SMALL_STEM
    if dataset is not None and dataset.num_classes != classes:
        raise CheckpointError(
            f"--dataset: {dataset.name} has {dataset.num_classes} classes, the network of {source} has {classes}"
        )
    method = _METHODS[found.kind]
    settings: dict[str, Any] = {
        "dataset": ("cifar100-lt" if small else "imagefolder") if dataset is None else dataset.name,
        "method": method,
        "model": description["name"],
        "num_experts": description["num_experts"],
        "pretrained": "none",
    }
    if dataset is not None:
        settings |= {"imbalance_factor": dataset.imbalance_factor}
    stage = 2 if method == "shike" else 1
    if method == "shike":
        warn(f"{source}: the classifiers of stage 2 are used; --stage 1 takes the others")
    config = resolve({name: value for name, value in settings.items() if value is not None})
    return {
        "format": FORMAT,
        "config": dataclasses.asdict(config),
        "data": _numbered(description, small) if dataset is None else data_description(dataset),
        "model_description": description,
        "model": found.state_dict,
        "stage": stage,
        "epoch": 0,
        "best": None,
    }


def _numbered(description: dict[str, Any], small: bool) -> dict[str, Any]:
    """What a checkpoint says of its data set, where nobody knows it."""
    classes = description["num_classes"]
    return {
        "version": __version__,
        "name": "",
        "fingerprint": "",
        "class_names": list(numbered_names(classes)),
        "class_counts": torch.ones(classes, dtype=torch.int64),
        "in_channels": description["in_channels"],
        "image_size": 32 if small else 224,
        "mean": list(MEAN if small else IMAGENET_MEAN),
        "std": list(STD if small else IMAGENET_STD),
        "margin": 1.0 if small else MARGIN,
        "imbalance_factor": None,
    }
