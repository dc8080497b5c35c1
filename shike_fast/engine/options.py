"""Every option of the training command, declared once; ``python -m shike_fast.engine.options`` prints their table.

Those of a method stand beside it, in :mod:`shike_fast.methods`.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shike_fast import data, methods, models
from shike_fast._util.cli import ArgumentParser, whole_number
from shike_fast._util.options import Check, Option, at_least, at_most, not_negative, option, options_of, positive
from shike_fast._util.plugins import add_plugin_option
from shike_fast.data.longtail import SUBSETS
from shike_fast.data.sampling import SAMPLERS
from shike_fast.data.types import MOST_PIXELS_A_SIDE
from shike_fast.errors import ConfigError

NO_WEIGHTS = "none"  # --pretrained
METHODS_OWN = "the method's own"
_MOST_THREADS = 1024
_share = Check("in [0, 1)", lambda value: 0 <= value < 1)


def _text(value: str) -> str:
    if not value:  # an unset variable of the user's script
        raise argparse.ArgumentTypeError("must not be empty")
    return value


def _model_names() -> list[str]:
    return [*models.list_models(), *models.list_model_families()]


def _is_count(value: str) -> bool:
    return value.isascii() and value.isdecimal() and int(value) >= 1


def _path(value: str) -> Path:
    return Path(_text(value))


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a run that every method has. Those without a default are a matter of the data set's recipe."""

    dataset: str = option("digits-lt", lambda: f"one of {', '.join(data.datasets())}", group="data")
    method: str = option(
        "shike",
        lambda: "; ".join(f"{name}: {methods.find_method(name).summary}" for name in methods.list_methods()),
        group="method",
        choices=methods.list_methods,
    )
    model: str = option(
        help=lambda: (
            f"one of {', '.join(_model_names())}, where timm:NAME is any of timm's networks that can be divided"
        ),
        group="method",
        choices=_model_names,
        also=models.is_model,
    )
    num_experts: int = option(3, "number of experts", group="method", flag="--experts", metavar="K", check=at_least(1))
    fusion: bool | None = option(
        None,
        "each expert weighs its map with a shallow one that all share",
        group="method",
        default_text=METHODS_OWN,
    )
    classifier: Literal["cosine", "linear"] | None = option(
        None, "the heads of the experts", group="method", default_text=METHODS_OWN
    )
    expert_stages: str | None = option(
        None,
        "how many of the last stages, or of the last blocks of a vision transformer, each expert has as its own copy; "
        "all: whole networks, which need --no-fusion",
        group="method",
        metavar="N|all",
        default_text=METHODS_OWN,
        check=Check("a whole number of at least 1, or all", lambda value: value == "all" or _is_count(value)),
    )
    expert_width: float | None = option(
        None,
        "factor of the width of those stages",
        group="method",
        metavar="F",
        default_text=METHODS_OWN,
        check=positive,
    )
    shortcut: Literal["projection", "pad"] | None = option(
        None,
        "where a basic block changes the shape: a 1x1 convolution, or zeros as new channels",
        group="method",
        default_text=METHODS_OWN,
    )
    epochs: int = option(help="epochs of all stages together", group="schedule", metavar="N", check=at_least(1))
    stage2_epochs: int = option(
        help="those of them that re-train the classifiers", group="schedule", metavar="N", check=at_least(0)
    )
    batch_size: int = option(
        help="images of an optimizer step, in all processes together", group="schedule", metavar="B"
    )
    lr: float = option(help="highest learning rate of stage 1", group="schedule", check=positive)
    stage2_lr: float = option(help="highest learning rate of stage 2", group="schedule", check=positive)
    trunk_lr: float | None = option(
        None,
        "highest learning rate of everything but the classifiers",
        group="schedule",
        metavar="LR",
        default_text="that of the classifiers",
        check=positive,
    )
    weight_decay: float = option(help="L2 penalty of SGD", group="schedule", check=not_negative)
    momentum: float = option(0.9, "momentum of SGD", group="schedule", check=_share)
    nesterov: bool = option(False, "Nesterov's momentum", group="schedule")
    warmup_epochs: int = option(
        5, "of each stage, at most half of it", group="schedule", metavar="N", check=at_least(0)
    )
    schedule: Literal["cosine", "step"] = option(
        "cosine", "how the learning rate falls after the warm-up: half a cosine to zero, or in steps", group="schedule"
    )
    step_epochs: tuple[int, ...] | None = option(
        None,
        "epochs after which the learning rate is multiplied, with --schedule step",
        group="schedule",
        metavar="E",
        default_text="4/5 and 9/10 of the stage",
        check=at_least(1),
    )
    step_factor: float = option(
        0.1, "what it is multiplied by at each step; 0.01 is published for CIFAR", group="schedule", check=positive
    )
    ema: float = option(
        0.0,
        "test and keep a moving average of the weights, of which every step leaves this share",
        group="schedule",
        metavar="DECAY",
        default_text="off",
        check=_share,
    )
    mixup: float = option(
        0.0,
        "mix pairs of images and their labels, in shares drawn from Beta(ALPHA, ALPHA)",
        group="schedule",
        metavar="ALPHA",
        default_text="off",
        check=not_negative,
    )
    cutmix: float = option(
        0.0,
        "paste a box of another image, of a share drawn from Beta(ALPHA, ALPHA); with --mixup, either by chance",
        group="schedule",
        metavar="ALPHA",
        default_text="off",
        check=not_negative,
    )
    unmixed_epochs: int = option(
        0, "do not mix in the last N epochs of the run", group="schedule", metavar="N", check=at_least(0)
    )
    stage2_start_lr_factor: float = option(
        0.25, "stage 2 warms up from this share of its learning rate", flag=None, check=not_negative
    )
    imbalance_factor: float | None = option(
        None,
        "images of the largest class over those of the smallest",
        group="data",
        metavar="IF",
        default_text="the data set's own",
    )
    augmentation: str | None = option(
        None, "training transform", group="data", metavar="NAME", default_text="the data set's own"
    )
    pretrained: str | None = option(
        None,
        "weights to start from, named as torchvision does (.pth or .safetensors), or as timm does for its networks; "
        "timm: those that it publishes, which it fetches",
        group="method",
        metavar="FILE|timm|none",
    )
    amp: Literal["auto", "off", "bf16", "fp16"] = option(
        "off", "mixed precision; auto: what is fastest here", group="schedule"
    )
    seed: int = option(0, "of all random numbers", group="schedule", check=at_least(0))
    deterministic: bool = option(False, "refuse operations that are not deterministic", group="schedule")
    data_dir: str | None = option(None, "where the data set lies", group="data", metavar="DIR", changeable=True)
    download: bool = option(False, "fetch a missing data set into --data-dir", group="data", changeable=True)
    verify: bool = option(
        True,
        "accept files of another size or checksum than the published ones",
        group="data",
        flag="--no-verify",
        changeable=True,
    )
    workers: int | None = option(
        None,
        "loader processes",
        group="data",
        metavar="N",
        default_text="chosen for the data set",
        check=at_least(0),
        changeable=True,
    )
    device: str | None = option(
        None, "cpu, cuda or cuda:N", group="schedule", default_text="cuda where there is one", changeable=True
    )
    threads: int = option(
        None,
        "CPU threads",
        group="schedule",
        metavar="N",
        default_text="one a core, and one for digits-lt",
        check=(at_least(1), at_most(_MOST_THREADS)),
        changeable=True,
    )
    save_every: int = option(
        0,
        "also save within an epoch, every so many steps",
        group="run",
        metavar="STEPS",
        default_text="never",
        check=at_least(0),
        changeable=True,
    )
    loader: Literal["auto", "cpu", "gpu", "device"] = option(
        "auto",
        "cpu: processes decode, the device augments; gpu: it also decodes; device: images in memory stay there",
        group="data",
        changeable=True,
    )
    channels_last: bool = option(
        True,
        "keep the channels of a pixel together, for which the kernels are made",
        group="speed",
        default_text="yes",
        changeable=True,
    )
    compile: bool = option(False, "compile the network with torch.compile", group="speed", changeable=True)
    cuda_graph: bool | None = option(
        None,
        "capture the step once and replay it",
        group="speed",
        default_text="for small images on one GPU",
        changeable=True,
    )
    optimizer: Literal["sgd", "apex"] = option(
        "sgd", "PyTorch's fused SGD or NVIDIA Apex's", group="speed", changeable=True
    )
    accumulate: int = option(
        1, "pass a process's share of a batch through in N parts", group="schedule", metavar="N", check=at_least(1)
    )
    sync_batch_norm: bool = option(
        False, "take BatchNorm's statistics over the images of all processes, not of each", group="speed"
    )
    checkpoint_activations: bool = option(
        False,
        "compute the blocks again in the backward pass instead of storing their insides: less memory, more time",
        group="speed",
        changeable=True,
    )
    image_size: int | None = option(
        None,
        "side of the images, for data sets of image files and for digits-lt",
        group="data",
        metavar="PX",
        default_text="224, and 8 for digits-lt",
        check=Check(f"from 1 to {MOST_PIXELS_A_SIDE}", lambda value: 1 <= value <= MOST_PIXELS_A_SIDE),
    )
    strict: bool = option(
        False, "stop at an image file that cannot be read, instead of replacing it", group="data", changeable=True
    )
    subset: str = option(
        "first",
        "which images of a class are kept: first, in file order, or as the code of LDAM and RIDE does",
        group="data",
        metavar="|".join(SUBSETS),
        choices=lambda: tuple(SUBSETS),
    )
    sampler: str = option(
        "instance",
        "how training images are drawn: each once an epoch, or classes in equal shares, by the square root of their "
        "size, or from their size to equal shares in the course of a stage; a stage of a method may say otherwise",
        group="data",
        metavar="|".join(SAMPLERS),
        choices=lambda: tuple(SAMPLERS),
    )
    plugins: tuple[str, ...] = option((), "modules of the user's own that were imported", flag=None, changeable=True)


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What a command is to do that is no setting of the run."""

    output_dir: str | None = option(
        None,
        "directory of the run",
        group="run",
        metavar="DIR",
        default_text="runs/DATASET-METHOD-TIME",
        parser={"type": _path},
    )
    resume: str | None = option(
        None,
        "go on with the run in --output-dir; auto: if there is one; FILE: from that checkpoint",
        group="run",
        metavar="auto|FILE",
        parser={"type": _text, "nargs": "?", "const": True},
    )
    config: str | None = option(
        None,
        "settings from a .json, .toml or .yaml file, such as the config.json of a run; flags override them",
        group="run",
        metavar="FILE",
        parser={"type": _path},
    )
    seeds: int | None = option(
        None,
        "train so many seeds, from --seed on, one after the other, and write mean and standard deviation",
        group="run",
        metavar="N",
        default_text="one",
        parser={"type": whole_number(1)},
    )
    profile: bool = option(False, "write a trace of ten steps and print what took the most time", group="speed")


def method_options() -> dict[str, list[tuple[str, Option]]]:
    """The hyper-parameters of all methods by name, each with the methods that have it.

    Raises:
        ConfigError: if a method calls one as another option is called, or two do that are of different types.
    """
    general = options_of(Settings) | options_of(RunOptions)
    flags = {one.flag: name for name, one in general.items()}
    found: dict[str, list[tuple[str, Option]]] = {}
    for method in methods.list_methods():
        for name, one in options_of(methods.find_method(method)).items():
            others = found.setdefault(name, [])
            alike = not others or (one.kind, one.several, one.flag) == _form(others[0][1])
            if name in general or one.flag in flags or one.flag == "--plugin" or not alike:
                raise ConfigError(f"method '{method}': another option is called {name} or {one.flag}; rename its own")
            others.append((method, one))
    return found


def _form(one: Option) -> tuple[type, bool, str | None]:
    return one.kind, one.several, one.flag


def add_options(parser: ArgumentParser) -> None:
    """Add all options to the parser of the training command."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    for title in ("data", "method", "schedule", "speed", "run", "hyper-parameters of methods"):
        groups[title] = parser.add_argument_group(title)
    for one in (*options_of(Settings).values(), *options_of(RunOptions).values()):
        if one.flag is not None:
            one.add_to(groups[one.group])
    for owners in method_options().values():
        note = f" [{', '.join(method for method, _ in owners)}]"
        owners[0][1].add_to(groups["hyper-parameters of methods"], note)
    add_plugin_option(groups["run"])


def markdown_table() -> str:
    """All flags as a Markdown table, for the documentation."""
    lines = ["| option | default | meaning | may change on resume |", "|---|---|---|---|"]
    for one in (*options_of(Settings).values(), *options_of(RunOptions).values()):
        lines += _row(one)
    for owners in method_options().values():
        lines += _row(owners[0][1], f" ({', '.join(method for method, _ in owners)})")
    return "\n".join(lines)


def _row(one: Option, note: str = "") -> list[str]:
    if one.flag is None:
        return []
    default = one.shown_default or ("" if one.has_default else "the recipe's")
    value = f" {one.metavar}".replace("|", "\\|") if one.metavar else ""
    other = f", `--no-{one.flag.removeprefix('--')}`" if one.is_both else ""
    return [f"| `{one.flag}{value}`{other} | {default} | {one.help_of()}{note} | {'yes' if one.changeable else ''} |"]


if __name__ == "__main__":
    print(markdown_table())
