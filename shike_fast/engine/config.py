"""What defines a training run, how defaults are filled in, and what a resumed run may change."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shike_fast import data, methods, models
from shike_fast._util.cli import choose_device
from shike_fast._util.options import Option, options_of
from shike_fast._util.plugins import missing_plugins
from shike_fast.data.types import DatasetInfo
from shike_fast.engine import finetuning
from shike_fast.engine.epochs import open_stage_epochs, place_steps, split_epochs, stage_epochs
from shike_fast.engine.options import own_options
from shike_fast.engine.precision import AUTO, settle_amp
from shike_fast.engine.schedule import cosine_with_warmup, scaled_steps, steps_with_warmup
from shike_fast.engine.settings import NO_WEIGHTS, Settings
from shike_fast.errors import CheckpointError, ConfigError
from shike_fast.methods import Method

_MODEL_OPTIONS = ("fusion", "classifier", "expert_stages", "expert_width", "shortcut")  # None: the method's own
NEEDS_PRETRAINED = "needs_pretrained"  # in a recipe: it begins with ImageNet weights

# What a resumed run may change: none of it alters the trajectory that the checkpoint began, beyond the rounding of
# another device.
CHANGEABLE = frozenset(name for name, option in options_of(Settings).items() if option.changeable)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Settings):
    """Every setting of a run; made by :func:`resolve`, stored in ``config.json`` and in each checkpoint.

    The options of the run's method and those of its data set are fields of a subclass that :func:`_config_class` makes.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _make, (dataclasses.asdict(self),)

    @property
    def stages(self) -> tuple[methods.Stage, ...]:
        """The stages of the run's method."""
        return methods.find_method(self.method).stages

    @property
    def stage_epochs(self) -> tuple[int, ...]:
        """The number of epochs of each stage."""
        return stage_epochs(self.stages, vars(self))

    @property
    def stage1_epochs(self) -> int:
        """Epochs of the first stage."""
        return self.stage_epochs[0]

    @property
    def shown_epochs(self) -> str:
        """The epochs of each stage, as in ``180+20``; of a single one as in ``200+0``."""
        lengths = self.stage_epochs
        return "+".join(map(str, lengths if len(lengths) > 1 else (*lengths, 0)))

    def stage_of(self, epoch: int) -> int:
        """The stage that the 0-based ``epoch`` belongs to, counted from 1."""
        return self._place(epoch)[0]

    def schedule_of(self, stage: methods.Stage) -> str:
        """How the learning rate of a stage falls, as ``--schedule`` calls it."""
        return stage.schedule or self.schedule

    def weight_decay_of(self, stage: methods.Stage) -> float:
        """The L2 penalty of a stage."""
        given = stage.weight_decay
        return getattr(self, given) if isinstance(given, str) else given

    def lr_of(self, epoch: int) -> float:
        """Learning rate of the 0-based ``epoch``; the warm-up takes at most half of a short stage.

        ``step_epochs`` are those of the stage without a length; other stages step at the same shares of theirs.
        """
        number, epoch = self._place(epoch)
        stage, epochs = self.stages[number - 1], self.stage_epochs[number - 1]
        base_lr: float = getattr(self, stage.lr)
        factor = stage.start_lr_factor
        start_lr = (getattr(self, factor) if isinstance(factor, str) else factor) * base_lr
        warmup_epochs = min(self.warmup_epochs, epochs // 2)
        if self.schedule_of(stage) == "cosine":
            return cosine_with_warmup(epoch, epochs, base_lr=base_lr, warmup_epochs=warmup_epochs, start_lr=start_lr)
        return steps_with_warmup(
            epoch,
            epochs,
            base_lr=base_lr,
            warmup_epochs=warmup_epochs,
            start_lr=start_lr,
            steps=scaled_steps(self.step_epochs or (), epochs, of=open_stage_epochs(self.stages, vars(self))),
            factor=self.step_factor,
        )

    def _place(self, epoch: int) -> tuple[int, int]:
        """Stage of an epoch, from 1, and its number within that, from 0."""
        for number, epochs in enumerate(self.stage_epochs, start=1):
            if epoch < epochs:
                return number, epoch
            epoch -= epochs
        return number, epochs + epoch

    @property
    def views(self) -> tuple[str | None, ...]:
        """The augmentation of each view that the method takes of a training image; None: the run's."""
        return methods.find_method(self.method).views(self)

    def model_arguments(self) -> dict[str, Any]:
        """Arguments of ``models.create_model``: those that the method implies, and what the user named before them."""
        named = self.named_model_options
        if named.get("expert_stages", "all") != "all":
            named["expert_stages"] = int(named["expert_stages"])
        options = methods.find_method(self.method).model_options(self)
        return {"name": self.model, "num_experts": self.num_experts, **options, **named}

    @property
    def named_model_options(self) -> dict[str, Any]:
        """The settings of the network that the user or a recipe named."""
        values = {name: getattr(self, name) for name in _MODEL_OPTIONS}
        return {name: value for name, value in values.items() if value is not None}

    def create_method(self, class_counts: Tensor) -> Method:
        """The run's method with its hyper-parameters.

        Args:
            class_counts: int64 [C], on the device of the run.
        """
        own = {name: getattr(self, name) for name in options_of(methods.find_method(self.method))}
        return methods.create_method(
            self.method, class_counts=class_counts, num_experts=self.num_experts, epochs=self.epochs, **own
        )


def _make(values: dict[str, Any]) -> TrainConfig:
    method: Any = methods.find_method(values["method"])
    return _config_class(method, _options_class(values["dataset"]))(**values)


def _options_class(dataset: str | None) -> type | None:
    """The class of the options that the data set has alone, where it is registered and has any."""
    info = data.datasets().get(dataset or "")
    return None if info is None else info.options


@functools.cache
def _config_class(method: type[Method], dataset: type | None) -> type[TrainConfig]:
    """:class:`TrainConfig` with the hyper-parameters of a method and the options of a data set as fields."""
    own_options()  # whose names they must not share
    own = options_of(method)
    settings = {*options_of(Settings), *own}
    for stage in method.stages:
        for used in (stage.epochs, stage.lr, stage.start_lr_factor, stage.weight_decay):
            if isinstance(used, str) and used not in settings:
                raise ConfigError(
                    f"method '{method.name}': its stage {stage.name} names the setting {used}, there is none"
                )
        schedules = (options_of(Settings)["schedule"].choices or tuple)()
        if stage.schedule is not None and stage.schedule not in schedules:
            raise ConfigError(
                f"method '{method.name}': its stage {stage.name} names the schedule {stage.schedule}, "
                f"there are {', '.join(schedules)}"
            )
    fields = [
        (field.name, field.type, dataclasses.field(default=field.default, metadata=field.metadata))
        for declaring in (method, dataset)
        if declaring is not None
        for field in dataclasses.fields(declaring)
        if field.name in options_of(declaring)
    ]
    return dataclasses.make_dataclass("TrainConfig", fields, bases=(TrainConfig,), frozen=True, kw_only=True)


def options_for(method: str, dataset: str | None = None) -> dict[str, Option]:
    """All settings of a run with this method on this data set, by name."""
    declaring = _options_class(dataset)
    of_dataset = {} if declaring is None else options_of(declaring)
    return options_of(Settings) | options_of(methods.find_method(method)) | of_dataset


def resolve(given: dict[str, Any], info: DatasetInfo | None = None) -> TrainConfig:
    """Fill what the user left out and check every value.

    The data set's recipe comes before the defaults, the method's recipe for the data set before that, and what the
    user named before all.

    Args:
        given: settings that the user named.
        info: of a data set that is not registered, but at hand (``LongTailData.info``): ``dataset`` is its name.

    Raises:
        ConfigError: naming the first unusable value.
    """
    method = _method_of(given)
    dataset = given.get("dataset", options_of(Settings)["dataset"].default)
    options = options_for(method.name, dataset)
    _require_known(given, method.name, dataset)
    info = info or _find_dataset(dataset)
    recipe = {**info.recipe, **method.recipes.get(info.name, {})}
    _require_settings(recipe, info.name)
    usual = {name: one.default for name, one in options.items() if one.has_default} | dict(method.defaults)
    usual |= {name: value for name, value in recipe.items() if name in options}
    values = usual | given
    if values["imbalance_factor"] is None:
        values["imbalance_factor"] = info.default_imbalance_factor
    if values["augmentation"] is None:
        values["augmentation"] = info.augmentations[0]
    if values["pretrained"] is None and recipe.get(NEEDS_PRETRAINED):
        raise ConfigError(
            f"--pretrained: the recipe of {values['dataset']} begins with ImageNet weights of {recipe['model']}, as "
            "torchvision publishes them; name their file, or say 'none' to begin at random"
        )
    if values["pretrained"] == NO_WEIGHTS:
        values["pretrained"] = None
    if values["adapter"] is not None and "freeze" not in given:
        values["freeze"] = finetuning.TRUNK
    if method.experts is not None:
        values["num_experts"] = _fixed_experts(method, given.get("num_experts", method.experts))
    if values["threads"] is None:
        values["threads"] = torch.get_num_threads()  # a resumed run repeats the rounding of this one
    for name, option in options.items():
        values[name] = option.check(values[name])
    split_epochs(values, given, usual, method)
    place_steps(values, given, usual, method)
    if values["amp"] == AUTO:
        values["amp"], _ = settle_amp(AUTO, choose_device(values["device"]))
    config = _make(values)
    _check_together(config)
    return config


def _method_of(given: dict[str, Any]) -> type[Method]:
    option = options_of(Settings)["method"]
    return methods.find_method(option.check(given.get("method", option.default)))


def _require_known(given: dict[str, Any], method: str, dataset: str) -> None:
    """Refuse what is no setting, or one of other methods or data sets alone."""
    unknown = given.keys() - options_of(Settings).keys() - own_options().keys()
    if unknown:
        raise ConfigError(f"unknown setting {', '.join(sorted(unknown))}")
    for name in sorted(given.keys() - options_for(method, dataset).keys()):
        owners = own_options()[name]
        others = ", ".join(f"'{owner}'" for owner, _ in owners)
        here = f"data set '{dataset}'" if owners[0][0] in data.datasets() else f"method '{method}'"
        raise ConfigError(f"{owners[0][1].label}: {here} has no such setting, it belongs to {others}")


def _require_settings(recipe: dict[str, Any], dataset: str) -> None:
    unknown = recipe.keys() - options_of(Settings).keys() - own_options().keys() - {NEEDS_PRETRAINED}
    if unknown:
        raise ConfigError(f"--dataset: the recipe of {dataset} has the unknown setting {', '.join(sorted(unknown))}")


def _fixed_experts(method: type[Method], given: int) -> int:
    if given != method.experts:
        is_single = "is a single plain network" if method.experts == 1 else f"has {method.experts} experts"
        raise ConfigError(f"--experts: method '{method.name}' {is_single}, got {given} experts")
    return given


def _find_dataset(name: str) -> DatasetInfo:
    if name not in data.datasets():
        raise ConfigError(f"--dataset: unknown data set '{name}'; choose from {', '.join(data.datasets())}")
    return data.datasets()[name]


def _check(config: TrainConfig) -> None:
    for name, option in options_for(config.method, config.dataset).items():
        option.check(getattr(config, name))
    _check_together(config)


def _check_together(config: TrainConfig) -> None:
    """Check what the type and the range of a single value do not show."""
    if min(config.stage_epochs) < 0:
        options = options_for(config.method)
        named = [options[stage.epochs] for stage in config.stages if isinstance(stage.epochs, str)]
        raise ConfigError(
            f"{', '.join(one.label for one in named)}: must be at most --epochs, which counts "
            f"{'both' if len(config.stages) == 2 else 'all'} stages ({config.epochs}), "
            f"got {sum(getattr(config, one.name) for one in named)}"
        )
    _check_schedule(config)
    _check_mixing(config)
    if config.nesterov and config.momentum == 0:
        raise ConfigError("--nesterov: there is no momentum to look ahead with; set --momentum, or leave it out")
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
    finetuning.check_settings(config)
    methods.find_method(config.method).check_settings(config)


def _check_schedule(config: TrainConfig) -> None:
    steps = config.step_epochs or ()
    if steps and all(config.schedule_of(stage) != "step" for stage in config.stages):
        raise ConfigError("--step-epochs: the learning rate follows a cosine; add --schedule step, or leave it out")
    most = open_stage_epochs(config.stages, vars(config)) - 1
    if list(steps) != sorted(steps) or (steps and steps[-1] > most):
        given = " ".join(map(str, steps))
        raise ConfigError(f"--step-epochs: must be rising numbers of epochs from 1 to {most}, got {given}")


def _check_mixing(config: TrainConfig) -> None:
    for name in ("mixup", "cutmix"):
        if getattr(config, name) and not methods.find_method(config.method).mixes:
            able = [other for other in methods.list_methods() if methods.find_method(other).mixes]
            raise ConfigError(
                f"--{name}: the loss of method '{config.method}' takes no second label; methods that do: "
                f"{', '.join(able)}"
            )
        if getattr(config, name) and config.unmixed_epochs >= config.epochs:
            raise ConfigError(
                f"--unmixed-epochs: must be less than --epochs ({config.epochs}), got {config.unmixed_epochs}; to mix "
                f"nothing leave --{name} out"
            )


def stored_config(stored: dict[str, Any], source: str) -> TrainConfig:
    """The settings that a checkpoint holds.

    Those of other methods, which version 0.1.0 stored too, are left out, and so are those of a data set that is not
    registered here, for it cannot be loaded.

    Args:
        stored: the checkpoint's ``config``.
        source: the checkpoint file, for the error.

    Raises:
        CheckpointError: if they are not those of this version, or of a model or method that is not registered here.
    """
    network, method = stored.get("model"), stored.get("method")
    for kind, name, is_known, known in (
        ("network", network, isinstance(network, str) and models.is_model(network), models.list_models()),
        ("method", method, method in methods.list_methods(), methods.list_methods()),
    ):
        if isinstance(name, str) and not is_known:
            raise CheckpointError(
                f"checkpoint {source} holds the {kind} '{name}', which is not registered in this process; "
                f"{how_to_register(stored.get('plugins', ()))}; there are {', '.join(known)}"
            )
    try:
        own = options_for(stored["method"], stored["dataset"])
        foreign = own_options().keys() - own.keys()
        if stored["dataset"] not in data.datasets():
            foreign |= stored.keys() - own.keys()
        config = _make({name: value for name, value in stored.items() if name not in foreign})
        _check(config)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"checkpoint {source} was written by another version of shike_fast ({error})") from error
    return config


def how_to_register(plugins: Iterable[str]) -> str:
    """What to do where something is not registered that a run with these plugins had."""
    missing = missing_plugins(plugins)
    return f"add {missing}, as the run had" if missing else "import the module that registers it first"


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
        given: settings that the user named.
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
    options = options_for(config.method, config.dataset)
    for name, value in sorted(given.items(), key=lambda item: item[0] not in ("method", "dataset")):
        if name not in options:
            _require_known({name: value}, config.method, config.dataset)
        if not options[name].changeable and getattr(config, name) != options[name].check(value):
            raise CheckpointError(
                f"checkpoint {source} belongs to another run: {name} is {getattr(config, name)!r}, the command line "
                f"says {value!r}; leave the option out to go on with it, or start a new run in another --output-dir"
            )
    return replace_settings(config, {name: value for name, value in given.items() if options[name].changeable})
