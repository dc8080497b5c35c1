"""What a checkpoint says about the model, the data set and the random generators, and the way back from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from shike_fast import data, methods, models
from shike_fast._util.options import options_of
from shike_fast._version import __version__
from shike_fast.engine import finetuning
from shike_fast.engine.averaging import WeightAverage
from shike_fast.engine.config import TrainConfig, how_to_register
from shike_fast.engine.distributed import Processes
from shike_fast.errors import CheckpointError, ConfigError
from shike_fast.methods import Method
from shike_fast.models.class_means import require_class_mean_heads
from shike_fast.models.multi_expert import TRAINABLE
from shike_fast.nn import convert_sync_batchnorm

_MOST_CHARACTERS = 400  # of torch's list of keys


def load_data(config: TrainConfig) -> data.LongTailData:
    """The data set of a run.

    Raises:
        DataError: if it cannot be loaded.
        ConfigError: if it is one of the user's own, which is not registered in this process.
    """
    if config.dataset not in data.datasets():
        raise ConfigError(
            f"the data set '{config.dataset}' is not registered in this process; {how_to_register(config.plugins)}; "
            f"there are {', '.join(data.datasets())}"
        )
    declaring = data.datasets()[config.dataset].options
    own = {} if declaring is None else {name: getattr(config, name) for name in options_of(declaring)}
    return data.load_dataset(
        config.dataset,
        data_dir=config.data_dir,
        imbalance_factor=config.imbalance_factor,
        augmentation=config.augmentation,
        download=config.download,
        verify=config.verify,
        seed=config.seed,
        image_size=config.image_size,
        strict=config.strict,
        subset=config.subset,
        long_tail=config.long_tail,
        **own,
    )


def build_model(config: TrainConfig, dataset: data.LongTailData, *, pretrained: bool) -> models.MultiExpertNetwork:
    """The network of a run, initialised at random; with ``pretrained`` also from the file ``config.pretrained``."""
    arguments = config.model_arguments()
    try:
        model = models.create_model(**arguments, num_classes=dataset.num_classes, in_channels=dataset.in_channels)
    except ValueError as error:
        flags = [_flag(name, value) for name, value in config.named_model_options.items()]
        with_flags = f" with {' '.join(flags)}" if flags else ""
        raise ConfigError(f"--model: {config.model} cannot be built for {dataset.name}{with_flags}: {error}") from error
    lacking = [name for name in TRAINABLE if not hasattr(model, name)]
    if lacking:
        raise ConfigError(
            f"--model: {config.model} cannot be trained, it has no {', '.join(lacking)}; docs/models.md says what a "
            "network of your own needs"
        )
    if config.trunk_lr is not None and not hasattr(model, "classifier_parameters"):
        raise ConfigError(
            f"--trunk-lr: {config.model} does not say which parameters are its classifiers'; give it "
            "classifier_parameters(), or leave --trunk-lr out"
        )
    if dataset.image_size < model.min_image_size:
        least, size = model.min_image_size, dataset.image_size
        raise ConfigError(
            f"--model: {config.model} needs images of at least {least}x{least}, {dataset.name} has {size}x{size}; "
            "use resnet8, resnet20 or resnet32, or a larger --image-size where the data set takes one"
        )
    if pretrained and config.pretrained is not None:
        models.load_pretrained(model, Path(config.pretrained))
    finetuning.prepare_model(model, config)
    method = methods.find_method(config.method)
    method.extend_model(model, config)
    finetuning.check_stages(model, method.stages, config)
    if config.init_classifier == finetuning.CLASS_MEANS:
        require_class_mean_heads(model)
    return model


def prepared_model(
    config: TrainConfig,
    dataset: data.LongTailData,
    device: torch.device,
    processes: Processes,
    state: dict[str, Any],
    source: Path,
) -> models.MultiExpertNetwork:
    """The network of a run on its device, in its layout: new, or with the weights of the checkpoint ``state``.

    Args:
        config, dataset, device, processes: of the run.
        state: a checkpoint; empty for a new run.
        source: its file, for errors.

    Raises:
        ConfigError: if the settings make no network.
        CheckpointError: if the checkpoint is of other data or of another network.
    """
    torch.manual_seed(config.seed)
    model = build_model(config, dataset, pretrained=not state)
    if state:
        restore_data(state, dataset, source)
        restore_model(state, model, source)
    model.to(device)
    model.to(memory_format=memory_format(config))  # type: ignore[call-overload]
    if config.sync_batch_norm and processes.is_distributed:
        convert_sync_batchnorm(model)
    return model


def memory_format(config: TrainConfig) -> torch.memory_format:
    """The layout of images and maps."""
    return torch.channels_last if config.channels_last else torch.contiguous_format


def normalisation_note(config: TrainConfig, dataset: data.LongTailData, model: torch.nn.Module) -> str | None:
    """What there is to say where pretrained weights know their images normalised in another way than the data set's."""
    if config.pretrained is None or (theirs := getattr(model, "normalisation", None)) is None:
        return None
    ours = dataset.mean, dataset.std
    if all(len(a) == len(b) and np.allclose(a, b, atol=1e-3) for a, b in zip(ours, theirs, strict=True)):
        return None
    shown = [
        f"mean {' '.join(f'{m:g}' for m in mean)}, std {' '.join(f'{s:g}' for s in std)}"
        for mean, std in (theirs, ours)
    ]
    return (
        f"normalisation: the weights of {config.model} were made for images of {shown[0]}; {dataset.name} has "
        f"{shown[1]}, to which training must adapt them"
    )


def model_from_checkpoint(
    state: dict[str, Any], source: Path, config: TrainConfig | None = None
) -> models.MultiExpertNetwork:
    """The network that a checkpoint describes, with its weights.

    Args:
        state: the checkpoint.
        source: its file, for errors.
        config: the run's settings, where its method may have extended the network.

    Raises:
        CheckpointError: if the description or the weights do not make a model of this version.
    """
    try:
        model = models.create_model(**state["model_description"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint {source} describes no model of this version of shike_fast, nor one registered here ({error})"
        ) from error
    if config is not None:
        methods.find_method(config.method).extend_model(model, config)
    restore_model(state, model, source)
    return model


def restore_model(state: dict[str, Any], model: models.MultiExpertNetwork, source: Path) -> None:
    """Load the weights of the checkpoint read from ``source`` into ``model``.

    Raises:
        CheckpointError: if they are those of another model.
    """
    if state["model_description"] != model.description:
        difference = _difference(state["model_description"], model.description)
        raise CheckpointError(
            f"{source}: the checkpoint holds another model: {difference}; "
            "leave the model options out to use the checkpoint's own"
        )
    try:
        model.load_state_dict(state["model"])
    except (RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())
        reason = reason if len(reason) <= _MOST_CHARACTERS else reason[:_MOST_CHARACTERS] + " ..."
        raise CheckpointError(f"{source}: the checkpoint's weights do not fit its model: {reason}") from error


def with_average(state: dict[str, Any], source: Path) -> dict[str, Any]:
    """The checkpoint read from ``source``, of a run with ``--ema``, with the averaged weights as those of its model.

    Raises:
        CheckpointError: if it has none.
    """
    average = state.get("average")
    if not isinstance(average, dict) or not isinstance(average.get("model"), dict) or "steps" not in average:
        raise CheckpointError(f"{source}: the checkpoint lacks the average of the weights that --ema keeps")
    return state | {"model": average["model"]}


def restore_average(state: dict[str, Any], average: WeightAverage, source: Path) -> None:
    """Undo :meth:`~shike_fast.engine.averaging.WeightAverage.state`, as kept in the checkpoint read from ``source``.

    Raises:
        CheckpointError: if it is not there, or of another model.
    """
    restore_model(with_average(state, source), average.network, source)
    average.steps.fill_(state["average"]["steps"])


def check_stage(method: Method, stage: int, source: Path) -> None:
    """Check that a method has the stage that a checkpoint, or ``--stage``, names by its number.

    Raises:
        CheckpointError: if it has not.
    """
    if not 1 <= stage <= len(method.stages):
        raise CheckpointError(
            f"--stage: checkpoint {source} was trained with method '{method.name}', which has no stage {stage}"
        )


def data_description(dataset: data.LongTailData) -> dict[str, Any]:
    """What a checkpoint keeps of the data set: enough to check it, and to name a prediction without it."""
    return {
        "version": __version__,
        "name": dataset.name,
        "fingerprint": dataset.fingerprint,
        "class_names": list(dataset.class_names),
        "class_counts": dataset.class_counts,
        "in_channels": dataset.in_channels,
        "image_size": dataset.image_size,
        "mean": list(dataset.mean),
        "std": list(dataset.std),
        "margin": getattr(dataset.test, "margin", 1.0),  # of the test transform: short side over side of the crop
        "imbalance_factor": dataset.imbalance_factor,
    }


def restore_data(state: dict[str, Any], dataset: data.LongTailData, source: Path) -> None:
    """Check that a run resumed from the checkpoint ``source`` sees the training images that it saw before.

    Raises:
        CheckpointError: if it does not.
    """
    if state["data"].get("fingerprint") != dataset.fingerprint:
        raise CheckpointError(
            f"{source}: the checkpoint was trained on other images than this {dataset.name} holds; "
            "point --data-dir at the data of that run (a pack is not the same images as its files), or start a new one"
        )


def rng_state(device: torch.device) -> dict[str, Any]:
    """State of torch's generators; only models with random layers depend on it."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Undo :func:`rng_state`; a generator that the saving machine did not have keeps its seed."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def _flag(name: str, value: Any) -> str:
    """A setting as the command line has it."""
    flag = options_of(TrainConfig)[name].label
    if isinstance(value, bool):
        return flag if value else flag.replace("--", "--no-", 1)
    return f"{flag} {value}"


def _difference(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    names = [name for name in sorted(theirs.keys() | ours.keys()) if theirs.get(name) != ours.get(name)]
    return ", ".join(f"{name} is {theirs.get(name)!r} there and {ours.get(name)!r} here" for name in names)
