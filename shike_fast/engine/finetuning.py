"""Fine-tuning: what the settings freeze and adapt, and what does not go together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from shike_fast import data, methods, models
from shike_fast._util.options import options_of
from shike_fast.data.images.augmented import AugmentedDataset
from shike_fast.engine.settings import Settings
from shike_fast.errors import ConfigError

OFF, TRUNK, ALL = "off", "trunk", "all-but-classifiers"  # --freeze
CLASS_MEANS = "class-means"  # --init-classifier
_OPTIONS = {  # of each adapter, by what add_adapters calls them
    "lora": {"rank": "lora_rank", "alpha": "lora_alpha", "dropout": "lora_dropout", "targets": "lora_targets"},
    "adaptformer": {"width": "adaptformer_width", "scale": "adaptformer_scale"},
}


def check_settings(settings: Any) -> None:
    """Refuse settings of fine-tuning that do not go together.

    Args:
        settings: has every setting of the run as an attribute.

    Raises:
        ConfigError: naming the option and the remedy.
    """
    for kind, options in _OPTIONS.items():
        given = [name for name in options.values() if getattr(settings, name) is not None]
        if given and settings.adapter != kind:
            label = options_of(Settings)[given[0]].label
            raise ConfigError(f"{label}: is a matter of --adapter {kind}; add that, or leave {label} out")
    if settings.adapter is not None and settings.freeze == OFF:
        raise ConfigError("--freeze: --adapter trains within a frozen trunk; use --freeze trunk, or leave --freeze out")
    if settings.trunk_lr is not None and settings.freeze == ALL and settings.adapter is None:
        raise ConfigError(
            f"--trunk-lr: is the rate of everything but the classifiers, of which --freeze {ALL} trains nothing; leave "
            "one of them out"
        )
    if settings.cache_features:
        _check_cache(settings)


def _check_cache(settings: Any) -> None:
    method = methods.find_method(settings.method)
    if settings.freeze == OFF:
        raise ConfigError(
            f"--cache-features: the trunk is trained, so that its features change; add --freeze {TRUNK} or --freeze "
            f"{ALL}"
        )
    if settings.adapter is not None:
        raise ConfigError(
            "--cache-features: the adapters in the trunk are trained, so that its features change; leave --adapter or "
            "--cache-features out"
        )
    for name in ("mixup", "cutmix"):
        if getattr(settings, name):
            raise ConfigError(f"--cache-features: --{name} makes new images in every step; leave one of them out")
    views = [view for view in method.views(settings) if view is not None]
    if views:
        raise ConfigError(
            f"--cache-features: method '{settings.method}' wants views with the augmentation {views[0]!r}, which "
            "differ from epoch to epoch; use another method, or leave --cache-features out"
        )
    if method.looks_at_images(settings):
        raise ConfigError(
            f"--cache-features: method '{settings.method}' does more with images than to pass them through the "
            "network (looks_at_images); use another method, or leave --cache-features out"
        )


def check_data(settings: Any, dataset: data.LongTailData) -> None:
    """Refuse features that are computed once where images look different in every epoch.

    Raises:
        ConfigError: saying so.
    """
    if settings.cache_features and not shown_as_tested(dataset):
        raise ConfigError(
            f"--cache-features: {dataset.name} shows an image differently in every epoch (--augmentation "
            f"{dataset.augmentation}); add --augmentation none, or leave --cache-features out"
        )


def shown_as_tested(dataset: data.LongTailData) -> bool:
    """Whether training images get the test transform."""
    train, test = dataset.train, dataset.test
    return (
        isinstance(train, AugmentedDataset)
        and isinstance(test, AugmentedDataset)
        and train.augmentation == test.augmentation
    )


def prepare_model(model: nn.Module, settings: Any) -> None:
    """Put in the adapters of a run and freeze what it freezes.

    Args:
        model: with its pretrained weights, before its method extends it.
        settings: has every setting of the run as an attribute.

    Raises:
        ConfigError: if the network has not what the settings ask for.
    """
    try:
        if settings.adapter is not None:
            given = {name: getattr(settings, option) for name, option in _OPTIONS[settings.adapter].items()}
            options = {name: value for name, value in given.items() if value is not None}
            models.add_adapters(model, settings.adapter, branches=settings.freeze == ALL, **options)
        elif settings.freeze != OFF:
            models.freeze(model, settings.freeze)
    except ConfigError:
        raise
    except ValueError as error:
        option = "--freeze" if settings.adapter is None else "--adapter"
        reason = str(error).partition(": ")[2]  # without the name of the function
        raise ConfigError(f"{option}: {settings.model}: {reason}") from error


def check_stages(model: models.MultiExpertNetwork, stages: Iterable[methods.Stage], settings: Any) -> None:
    """Refuse a stage of the run's method to which ``--freeze`` leaves nothing to train, or a cache without its network.

    Raises:
        ConfigError: naming the stage.
    """
    if settings.freeze == OFF:
        return
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for stage in stages:
        if all(names[id(parameter)] in model.frozen for parameter in stage.trains(model)):
            raise ConfigError(
                f"--freeze: {settings.freeze} leaves nothing to train to stage {stage.name} of method "
                f"'{settings.method}'; freeze less, or use another method"
            )
    if settings.cache_features and type(model).features is not models.MultiExpertNetwork.features:
        raise ConfigError(
            f"--cache-features: {settings.model} overrides features(), so that its trunk cannot be replaced; "
            "leave it out"
        )


def random_trunk_note(settings: Any) -> str | None:
    """What there is to say of a new run that freezes random weights."""
    if settings.freeze == OFF or settings.pretrained is not None:
        return None
    return f"--freeze {settings.freeze} without --pretrained: what is frozen has random weights"
