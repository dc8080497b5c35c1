"""What defines a training run, how defaults are filled in, and what a resumed run may change."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from shike_fast import data, models
from shike_fast._util.cli import choose_device
from shike_fast.data.longtail import SUBSETS
from shike_fast.data.types import MOST_PIXELS_A_SIDE
from shike_fast.engine.optimizer import OPTIMIZERS
from shike_fast.engine.precision import AUTO, settle_amp
from shike_fast.engine.recipes import recipe_of
from shike_fast.engine.schedule import cosine_with_warmup
from shike_fast.errors import CheckpointError, ConfigError

Method = Literal["shike", "ce"]
Amp = Literal["off", "bf16", "fp16"]
LoaderKind = Literal["auto", "cpu", "gpu", "device"]

# What a resumed run may change: none of it alters the trajectory that the checkpoint began, beyond the rounding of
# another device.
CHANGEABLE = frozenset(
    {
        "data_dir",
        "workers",
        "device",
        "threads",
        "save_every",
        "download",
        "verify",
        "loader",
        "strict",
        "compile",
        "cuda_graph",
        "checkpoint_activations",
        "channels_last",
        "optimizer",
    }
)


@dataclass(frozen=True)
class TrainConfig:
    """Every setting of a run; made by :func:`resolve`, stored in ``config.json`` and in each checkpoint."""

    dataset: str
    method: Method
    model: str
    num_experts: int
    epochs: int
    stage2_epochs: int
    batch_size: int
    lr: float
    stage2_lr: float
    weight_decay: float
    momentum: float
    warmup_epochs: int
    stage2_start_lr_factor: float
    hardest_weight: float
    mutual_weight: float
    scale: float
    kl_reduction: Literal["mean", "batchmean"]
    imbalance_factor: float | None
    augmentation: str
    pretrained: str | None
    amp: Amp
    seed: int
    deterministic: bool
    data_dir: str | None
    download: bool
    verify: bool
    workers: int | None
    device: str | None
    threads: int
    save_every: int
    loader: LoaderKind = "auto"
    channels_last: bool = True
    compile: bool = False
    cuda_graph: bool | None = None  # None: where it pays
    optimizer: Literal["sgd", "apex"] = "sgd"
    accumulate: int = 1
    sync_batch_norm: bool = False
    checkpoint_activations: bool = False
    image_size: int | None = None  # None: the data set's own
    strict: bool = False
    subset: str = "first"

    @property
    def stage1_epochs(self) -> int:
        """Epochs before the classifiers are re-trained."""
        return self.epochs - self.stage2_epochs

    def stage_of(self, epoch: int) -> int:
        """1 or 2: the stage that the 0-based ``epoch`` belongs to."""
        return 1 if epoch < self.stage1_epochs else 2

    def lr_of(self, epoch: int) -> float:
        """Learning rate of the 0-based ``epoch``; the warm-up takes at most half of a short stage."""
        if self.stage_of(epoch) == 1:
            epochs, base_lr, start_lr = self.stage1_epochs, self.lr, 0.0
        else:
            epochs, base_lr, start_lr = self.stage2_epochs, self.stage2_lr, self.stage2_start_lr_factor * self.stage2_lr
            epoch -= self.stage1_epochs
        warmup_epochs = min(self.warmup_epochs, epochs // 2)
        return cosine_with_warmup(epoch, epochs, base_lr=base_lr, warmup_epochs=warmup_epochs, start_lr=start_lr)

    def model_arguments(self) -> dict[str, Any]:
        """Arguments of ``models.create_model`` that the method implies: ``ce`` is the backbone as a plain network."""
        if self.method == "ce":
            return {"name": self.model, "num_experts": 1, "fusion": False, "classifier": "linear"}
        return {"name": self.model, "num_experts": self.num_experts, "scale": self.scale}


NO_WEIGHTS = "none"  # --pretrained
_MOST_THREADS = 1024
_DEFAULTS: dict[str, Any] = {
    "dataset": "digits-lt",
    "method": "shike",
    "num_experts": 3,
    "momentum": 0.9,
    "kl_reduction": "mean",
    "imbalance_factor": None,
    "augmentation": None,
    "pretrained": None,
    "amp": "off",
    "seed": 0,
    "deterministic": False,
    "data_dir": None,
    "download": False,
    "verify": True,
    "workers": None,
    "device": None,
    "save_every": 0,
}


def resolve(given: dict[str, Any]) -> TrainConfig:
    """Fill what the user left out from the data set's recipe and check every value.

    Args:
        given: fields of :class:`TrainConfig` that the user named.

    Raises:
        ConfigError: naming the first unusable value.
    """
    unknown = given.keys() - {field.name for field in dataclasses.fields(TrainConfig)}
    if unknown:
        raise ConfigError(f"unknown setting {', '.join(sorted(unknown))}")
    values = _DEFAULTS | given
    if values["dataset"] not in data.datasets():
        raise ConfigError(
            f"--dataset: unknown data set '{values['dataset']}'; choose from {', '.join(data.datasets())}"
        )
    info = data.datasets()[values["dataset"]]
    recipe = recipe_of(info)
    if values["imbalance_factor"] is None:
        values["imbalance_factor"] = info.default_imbalance_factor
    if values["augmentation"] is None:
        values["augmentation"] = info.augmentations[0]
    needs_pretrained = recipe.pop("needs_pretrained")
    _split_epochs(values, recipe)
    values = recipe | values
    if values["pretrained"] is None and needs_pretrained:
        raise ConfigError(
            f"--pretrained: the recipe of {values['dataset']} begins with ImageNet weights of {recipe['model']}, as "
            "torchvision publishes them; name their file, or say 'none' to begin at random"
        )
    if values["pretrained"] == NO_WEIGHTS:
        values["pretrained"] = None
    if values["method"] == "ce":
        if given.get("num_experts", 1) != 1:
            raise ConfigError(f"--experts: method 'ce' is a single plain network, got {given['num_experts']} experts")
        values["num_experts"] = 1
    if values["threads"] is None:
        values["threads"] = torch.get_num_threads()  # a resumed run repeats the rounding of this one
    if values["amp"] == AUTO:
        values["amp"], _ = settle_amp(AUTO, choose_device(values["device"]))
    config = TrainConfig(**values)
    _check(config)
    return config


def _split_epochs(values: dict[str, Any], recipe: dict[str, Any]) -> None:
    """Choose the length of stage 2 where only the total was given: the recipe's share of it, at least one epoch."""
    if values["method"] == "ce":
        if values.setdefault("stage2_epochs", 0) != 0:
            raise ConfigError(f"--stage2-epochs: method 'ce' has no second stage, got {values['stage2_epochs']}")
    elif "stage2_epochs" not in values and "epochs" in values:
        share = recipe["stage2_epochs"] / recipe["epochs"]
        values["stage2_epochs"] = max(1, round(values["epochs"] * share)) if values["epochs"] > 1 else 0


def _check(config: TrainConfig) -> None:
    _one_of("--method", config.method, get_args(Method))
    if config.amp not in get_args(Amp):  # "auto" was settled before
        raise ConfigError(f"--amp: must be one of {', '.join((AUTO, *get_args(Amp)))}, got '{config.amp}'")
    _one_of("--subset", config.subset, list(SUBSETS))
    _one_of("--kl-reduction", config.kl_reduction, ("mean", "batchmean"))
    _one_of("--model", config.model, models.list_models())
    _at_least("--epochs", config.epochs, 1)
    _at_least("--stage2-epochs", config.stage2_epochs, 0)
    if config.stage2_epochs > config.epochs:
        raise ConfigError(
            f"--stage2-epochs: must be at most --epochs, which counts both stages ({config.epochs}), "
            f"got {config.stage2_epochs}"
        )
    _one_of("--loader", config.loader, get_args(LoaderKind))
    _one_of("--optimizer", config.optimizer, OPTIMIZERS)
    _at_least("--accumulate", config.accumulate, 1)
    if config.batch_size < 2 * config.accumulate:  # BatchNorm needs two values a channel
        per_pass = f" for each of --accumulate {config.accumulate}" if config.accumulate > 1 else ""
        raise ConfigError(f"--batch-size: must be at least 2{per_pass}, got {config.batch_size}")
    if config.cuda_graph and config.optimizer == "apex":
        raise ConfigError(
            "--cuda-graph: NVIDIA Apex bakes the learning rate into a recorded step; use --optimizer sgd, or "
            "--no-cuda-graph"
        )
    if config.cuda_graph and config.checkpoint_activations:
        raise ConfigError(
            "--cuda-graph: does not record a step with --checkpoint-activations; leave that out, or use --no-cuda-graph"
        )
    _at_least("--experts", config.num_experts, 1)
    _at_least("--warmup-epochs", config.warmup_epochs, 0)
    if config.image_size is not None and not 1 <= config.image_size <= MOST_PIXELS_A_SIDE:
        raise ConfigError(f"--image-size: must be from 1 to {MOST_PIXELS_A_SIDE}, got {config.image_size}")
    _at_least("--save-every", config.save_every, 0)
    _at_least("--seed", config.seed, 0)
    _at_least("--threads", config.threads, 1)
    if config.threads > _MOST_THREADS:
        raise ConfigError(f"--threads: must be at most {_MOST_THREADS}, got {config.threads}")
    if config.workers is not None:
        _at_least("--workers", config.workers, 0)
    for flag, value in (("--lr", config.lr), ("--stage2-lr", config.stage2_lr), ("--scale", config.scale)):
        if not (math.isfinite(value) and value > 0):
            raise ConfigError(f"{flag}: must be a positive number, got {value}")
    for flag, value in (
        ("--weight-decay", config.weight_decay),
        ("--hardest-weight", config.hardest_weight),
        ("--mutual-weight", config.mutual_weight),
    ):
        if not (math.isfinite(value) and value >= 0):
            raise ConfigError(f"{flag}: must be a number of at least 0, got {value}")
    if not 0 <= config.momentum < 1:
        raise ConfigError(f"--momentum: must be in [0, 1), got {config.momentum}")


def _one_of(flag: str, value: str, choices: tuple[str, ...] | list[str]) -> None:
    if value not in choices:
        raise ConfigError(f"{flag}: must be one of {', '.join(choices)}, got '{value}'")


def _at_least(flag: str, value: int, minimum: int) -> None:
    if value < minimum:
        raise ConfigError(f"{flag}: must be at least {minimum}, got {value}")


def stored_config(stored: dict[str, Any], source: str) -> TrainConfig:
    """The settings that a checkpoint holds.

    Args:
        stored: the checkpoint's ``config``.
        source: the checkpoint file, for the error.

    Raises:
        CheckpointError: if they are not those of this version, or of a model that is not registered here.
    """
    model = stored.get("model")
    if isinstance(model, str) and model not in models.list_models():
        raise CheckpointError(
            f"checkpoint {source} holds the network '{model}', which is not registered in this process; import the "
            f"module that registers it first; there are {', '.join(models.list_models())}"
        )
    try:
        config = TrainConfig(**stored)
        _check(config)
    except (TypeError, ConfigError) as error:
        raise CheckpointError(f"checkpoint {source} was written by another version of shike_fast ({error})") from error
    return config


def replace_settings(config: TrainConfig, given: dict[str, Any]) -> TrainConfig:
    """The settings with some of them replaced.

    Raises:
        ConfigError: naming the first unusable one.
    """
    config = dataclasses.replace(config, **given)
    _check(config)
    return config


def resume_config(stored: dict[str, Any], given: dict[str, Any], source: str) -> TrainConfig:
    """Settings of a resumed run: those of the checkpoint, with the changeable ones replaced by what the user named.

    Args:
        stored: the checkpoint's ``config``.
        given: fields that the user named on the command line.
        source: the checkpoint file, for the error.

    Raises:
        CheckpointError: if the user names a value that differs from the checkpoint's and would change the run.
        ConfigError: if one that may change is unusable.
    """
    config = stored_config(stored, source)
    if given.get("pretrained") == NO_WEIGHTS:
        given = given | {"pretrained": None}
    if given.get("amp") == AUTO:
        given = given | {"amp": config.amp}  # what the run began with: another would alter it
    for name, value in given.items():
        if name not in CHANGEABLE and getattr(config, name) != value:
            raise CheckpointError(
                f"checkpoint {source} belongs to another run: {name} is {getattr(config, name)!r}, the command line "
                f"says {value!r}; leave the option out to go on with it, or start a new run in another --output-dir"
            )
    return replace_settings(config, {name: value for name, value in given.items() if name in CHANGEABLE})
