"""What a training method is: its stages, the network it wants, its loss, and what it does besides."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, dataclass_transform

import torch
from torch import Tensor, nn

from shike_fast._util.options import option, options_of
from shike_fast.data.sampling import check_sampler


def all_but_second_classifiers(model: nn.Module) -> Iterable[nn.Parameter]:
    """The parameters of a network but those of its second classifiers."""
    second = {id(parameter) for parameter in second_classifiers(model)}
    return (parameter for parameter in model.parameters() if id(parameter) not in second)


def second_classifiers(model: Any) -> Iterable[nn.Parameter]:
    """The parameters of the second classifiers of a network."""
    return model.stage2_parameters()


@dataclass(frozen=True)
class Stage:
    """A part of a run that has its own optimizer.

    Attributes:
        name: one word.
        epochs: the setting that gives its number of epochs, or its share of ``--epochs``. None: those that the other
            stages leave, in exactly one stage of a method.
        lr: the setting that gives its highest learning rate.
        start_lr_factor: the warm-up begins at this share of it: a number, or the setting that gives it.
        classifiers: whose logits it trains and tests: 1 for the network's first classifiers, 2 for the second ones.
        trains: the parameters of the network that it trains; all others are frozen.
        schedule: how its learning rate falls, ``cosine`` or ``step``; None for what ``--schedule`` says.
        weight_decay: its L2 penalty: a number, or the setting that gives it.
        frozen_features: the features are computed without gradient, in training mode all the same, so that the
            statistics of BatchNorm move on.
        terms: names of the terms that :meth:`Method.loss` returns in this stage.
        sampler: the name of the one that draws its training images; None: that of ``--sampler``.
    """

    name: str
    epochs: str | float | None = None
    lr: str = "lr"
    start_lr_factor: str | float = 0.0
    schedule: str | None = None
    weight_decay: str | float = "weight_decay"
    classifiers: int = 1
    trains: Callable[[nn.Module], Iterable[nn.Parameter]] = all_but_second_classifiers
    frozen_features: bool = False
    terms: tuple[str, ...] = ()
    sampler: str | None = None


@dataclass_transform(kw_only_default=True, eq_default=False, field_specifiers=(option,))
@dataclass(kw_only=True, eq=False, repr=False)
class Method(ABC):
    """A training method. A subclass is one file; :func:`~shike_fast.methods.register_method` shows a whole one.

    A subclass is a dataclass whose fields are its hyper-parameters, each declared by
    :func:`~shike_fast.methods.option`, which makes it a flag of ``shike_fast.train``. What is computed from them once
    is the matter of ``__post_init__``. Tensors that it keeps lie on the device of ``class_counts``.

    The step of a stage may be captured as a CUDA graph. Therefore :meth:`loss`, :meth:`forward` and :meth:`after_step`
    never wait for the device, and what changes from step to step is changed in place, in tensors.

    Class attributes:
        name: what ``--method`` calls it.
        summary: one line.
        source: the paper.
        stages: its stages, in their order.
        experts: the number of experts that it needs; None for any.
        defaults: its defaults for settings that are not its own, below those of a data set's recipe.
        recipes: its settings for a data set, by the name of that, above those of the data set's recipe.
        mixes: :meth:`loss` takes a second label, so that ``--mixup`` and ``--cutmix`` may mix the images.

    Attributes:
        class_counts: int64 [C], training images of each class.
        num_experts: K.
        epochs: of the whole run, such as for a loss that changes after four fifths of it.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str] = ""
    stages: ClassVar[tuple[Stage, ...]]
    experts: ClassVar[int | None] = None
    defaults: ClassVar[Mapping[str, Any]] = {}
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    mixes: ClassVar[bool] = False

    class_counts: Tensor
    num_experts: int
    epochs: int = 200

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        dataclass(kw_only=True, eq=False, repr=False)(cls)

    @classmethod  # noqa: B027  # a hook
    def check_settings(cls, settings: Any) -> None:
        """Refuse settings that do not go together with the method, by a ``ConfigError`` that says what fits."""

    @classmethod
    def model_options(cls, settings: Any) -> dict[str, Any]:
        """What :func:`~shike_fast.models.create_model` gets besides the number of experts.

        Args:
            settings: has every setting of the run as an attribute, the method's own among them.
        """
        return {}

    @classmethod  # noqa: B027  # a hook
    def extend_model(cls, model: nn.Module, settings: Any) -> None:
        """Add modules of the method's own to a new network, such as a router: ``model.router = ...``.

        They are trained, saved and loaded with it.
        """

    @classmethod
    def views(cls, settings: Any) -> tuple[str | None, ...]:
        """How a training batch shows its images: for each view the name of an augmentation of the data set.

        None is that of ``--augmentation``. With V views of b images :meth:`forward` gets V·b images, view 0 of all of
        them, then view 1, and so on; :meth:`loss` gets logits [K, V·b, C] and the labels, repeated to [V·b]. Views of
        the same augmentation differ in their random numbers. BatchNorm sees all V·b images. ``--batch-size`` counts
        images, not views, and so does the training accuracy, which is that of view 0.

        Args:
            settings: has every setting of the run as an attribute, the method's own among them.
        """
        return (None,)

    @classmethod
    def looks_at_images(cls, settings: Any) -> bool:
        """Whether :meth:`forward` does more with images than to call ``model`` or ``model.features`` with them.

        Only where it does not, ``--cache-features`` can hand it something else in their place. By default every
        ``forward`` of a method's own is taken to do so.

        Args:
            settings: has every setting of the run as an attribute, the method's own among them.
        """
        return cls.forward is not Method.forward

    def forward(self, model: Any, images: Tensor, stage: Stage) -> Tensor | dict[str, Tensor]:
        """What a stage trains: images [B, channels, H, W] -> logits [K, B, C].

        It may also return a dictionary: ``logits``, and other tensors that :meth:`loss` gets by these names.
        """
        if not stage.frozen_features:
            return model(images, stage=stage.classifiers)
        with torch.no_grad():
            features = model.features(images)
        return model.classify(features, stage.classifiers)

    @abstractmethod
    def loss(
        self, logits: Tensor, target: Tensor, *, stage: Stage, epoch: int = 0, **inputs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch and what it is made of.

        Args:
            logits: [K, B, C], where B counts an image once for each of its :meth:`views`.
            target: int64 [B].
            stage: a subclass gives it the first stage as default.
            epoch: of the run, from 0, as :meth:`phase` gives it.
            inputs: what :meth:`forward` returned besides the logits. In an epoch with mixed images also ``target_b``,
                int64 [B], their second labels, and ``lam``, float32 [] on the device, the weight of ``target``; that
                of ``target_b`` is ``1 - lam``.

        Returns:
            A scalar, the mean over the batch, and its terms: detached scalars, named as in ``stage.terms``.
        """

    def phase(self, epoch: int) -> int:
        """The epoch that :meth:`loss` receives in ``epoch``; a captured step is captured anew where it changes.

        By default they are the same. A loss that stays, or changes in a few epochs only, returns the last of these.
        """
        return epoch

    def lr_factor(self, name: str, stage: Stage) -> float:
        """What the stage's learning rate is multiplied by for a parameter, at least 0.

        Args:
            name: of the parameter, as in ``model.named_parameters()``.
            stage: one that trains it.
        """
        return 1.0

    def start_epoch(self, epoch: int, model: nn.Module, stage: Stage) -> None:  # noqa: B027  # a hook
        """Called before the 0-based ``epoch``, and again where a stopped run resumes within it: to the same effect."""

    def after_step(self, model: nn.Module) -> None:  # noqa: B027  # a hook
        """Called after every step of the optimizer, such as for a moving average of the weights."""

    def evaluated(self, model: nn.Module) -> nn.Module:
        """The network that is tested in place of ``model``, such as a moving average of it; the same at every call.

        With ``--ema`` ``model`` is the run's moving average, which is tested unless this returns another one.
        """
        return model

    def scores(self, logits: Tensor, *, stage: Stage) -> Tensor:
        """The prediction: logits [K, B, C] -> [B, C], whose softmax are the probabilities of the classes."""
        return logits.mean(0)

    def prior_of_scores(self, stage: Stage) -> Literal["train", "uniform"]:
        """The class prior that :meth:`scores` are for, which a correction for a known test prior takes out.

        Plain cross-entropy learns p(y|x) under the ``train`` prior, the classes' shares of the images that are drawn: a
        sampler that changes these is accounted for. A loss that balances the classes (balanced softmax, logit
        adjustment) learns it under the ``uniform`` one.
        """
        return "train"

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the method: tensors and plain values."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:  # noqa: B027  # a hook
        """Undo :meth:`state`, after the first call of :meth:`evaluated`."""


def check_method(method: type[Method]) -> None:
    """Check that a class can be registered.

    Raises:
        TypeError, ValueError: saying what is wrong with it.
    """
    if not (isinstance(method, type) and issubclass(method, Method)):
        raise TypeError(f"register_method: must be a subclass of Method, got {method!r}")
    lacking = [name for name in ("name", "summary", "stages") if not getattr(method, name, None)]
    if method.loss is Method.loss:
        lacking.append("loss")
    if lacking:
        raise TypeError(f"register_method: {method.__name__} has no {', '.join(lacking)}")
    names = [stage.name for stage in method.stages]
    if len(set(names)) < len(names):
        raise ValueError(f"register_method: {method.name}: two stages have the same name, got {', '.join(names)}")
    if sum(stage.epochs is None for stage in method.stages) != 1:
        raise ValueError(f"register_method: {method.name}: one stage, and no other, must have no epochs of its own")
    for stage in method.stages:
        if len(set(stage.terms)) < len(stage.terms) or {"loss", "top1"} & set(stage.terms):
            raise ValueError(
                f"register_method: {method.name}: terms must have different names, other than loss and top1, "
                f"got {', '.join(stage.terms)}"
            )
        if stage.sampler is not None:
            check_sampler(stage.sampler)
    known = {*options_of(method), "class_counts", "num_experts", "epochs"}
    bare = [field.name for field in dataclasses.fields(method) if field.name not in known and field.init]
    if bare:
        raise TypeError(f"register_method: {method.name}: {', '.join(bare)} must be declared by option()")
