"""ImageNet weights with torchvision's names for the shared stages and for every expert's copy of the last stage."""

from __future__ import annotations

import pickle
import re
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from shike_fast.errors import CheckpointError
from shike_fast.models._state_dict import check_fit, plain_tensors
from shike_fast.models.resnet import MultiExpertResNet


@dataclass(frozen=True)
class PretrainedReport:
    """What :func:`load_pretrained` did.

    Attributes:
        loaded: entries of the model's state_dict that were set.
        untouched: entries of the model's state_dict left as they were (fusion, classifiers).
        ignored: entries of the file that were not used (the classifier ``fc``).
    """

    loaded: tuple[str, ...]
    untouched: tuple[str, ...]
    ignored: tuple[str, ...]


def load_pretrained(model: MultiExpertResNet, path: str | PathLike[str]) -> PretrainedReport:
    """Load torchvision-named weights: ``conv1``, ``bn1``, ``layer1`` ... as they are, the last stage into every expert.

    The whole file is checked before anything is loaded. ``fc`` is not used. Files without ``num_batches_tracked``, as
    torchvision's older ones, are complete. No pickle is executed (``weights_only=True``).

    Args:
        model: changed in place; the dtype and device of its parameters stay.
        path: a ``.safetensors`` file, or anything else for a state_dict saved by ``torch.save`` (``.pth``, ``.pt``).

    Returns:
        The names of what was loaded, left alone and ignored.

    Raises:
        CheckpointError: the file cannot be read, or does not fit (lists missing and unknown keys and wrong shapes).
    """
    path = Path(path)
    file = plain_tensors(_read(path), str(path))
    ignored = tuple(key for key in file if key.startswith("fc."))
    given = {key: tensor for key, tensor in file.items() if key not in ignored}

    target = model.state_dict()
    last_stage = f"layer{model.num_shared + 1}."
    source_of = {
        key: re.sub(r"^experts\.\d+\.", last_stage, key)
        for key in target
        if not key.startswith(("fusions.", "classifiers.", "rt_classifiers."))
    }
    expected = {source: target[key].shape for key, source in source_of.items()}
    optional = [source for source in expected if source.endswith(".num_batches_tracked")]
    check_fit(given, expected, optional, str(path))

    loaded = {key: given[source] for key, source in source_of.items() if source in given}
    for key, tensor in loaded.items():
        target[key].copy_(tensor)
    return PretrainedReport(tuple(loaded), tuple(key for key in target if key not in loaded), ignored)


def require_weight_file(path: Path) -> None:
    """Refuse weights that are not there.

    Raises:
        CheckpointError: naming the file.
    """
    if not path.is_file():
        raise CheckpointError(f"--pretrained: {path} is not a file; name weights in .pth or .safetensors format")


def _read(path: Path) -> dict[str, Tensor]:
    require_weight_file(path)
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: holds more than tensors, or is no weight file; loading it could execute code. Save its state_dict"
        ) from error
    except Exception as error:  # on damaged bytes the two readers raise a dozen unrelated types
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path}: cannot be read as weights ({reason}); is the file complete?") from error
