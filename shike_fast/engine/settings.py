"""The options of the training command, each declared once.

Those of a method stand beside it, in :mod:`shike_fast.methods`, those of a data set beside that.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shike_fast import data, methods, models
from shike_fast._util.cli import whole_number
from shike_fast._util.options import (
    Check,
    at_least,
    at_most,
    not_negative,
    option,
    positive,
)
from shike_fast.data.longtail import PROFILES, SUBSETS
from shike_fast.data.sampling import SAMPLERS
from shike_fast.data.types import MOST_PIXELS_A_SIDE
from shike_fast.engine.trackers import NO_TRACKER, TRACKERS, are_trackers

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
    freeze: Literal["off", "trunk", "all-but-classifiers"] = option(
        "off",
        "what stays as it is, without gradient and in eval mode",
        group="fine-tuning",
        default_text="off; trunk with --adapter",
    )
    adapter: Literal["lora", "adaptformer"] | None = option(
        None,
        "small weights that are trained within a frozen trunk; with --freeze all-but-classifiers in the branches too",
        group="fine-tuning",
        default_text="none",
    )
    lora_rank: int | None = option(
        None, "rank of LoRA", group="fine-tuning", metavar="R", default_text="8", check=at_least(1)
    )
    lora_alpha: float | None = option(
        None,
        "what LoRA adds is multiplied by this over the rank",
        group="fine-tuning",
        metavar="A",
        default_text="the rank",
        check=positive,
    )
    lora_dropout: float | None = option(
        None, "dropout of what LoRA's weights get", group="fine-tuning", metavar="P", default_text="0", check=_share
    )
    lora_targets: tuple[str, ...] | None = option(
        None,
        "layers that LoRA adapts, by the ends of their names",
        group="fine-tuning",
        metavar="NAME",
        default_text="the linear layers of attention and MLPs",
    )
    adaptformer_width: int | None = option(
        None,
        "width of AdaptFormer's bottleneck",
        group="fine-tuning",
        metavar="N",
        default_text="64",
        check=at_least(1),
    )
    adaptformer_scale: float | None = option(
        None, "factor of what AdaptFormer adds", group="fine-tuning", metavar="S", default_text="0.1", check=positive
    )
    init_classifier: Literal["random", "class-means"] = option(
        "random",
        "how the classifiers begin; class-means: as the mean features of the classes, by a pass over the images",
        group="fine-tuning",
    )
    cache_features: bool = option(
        False,
        "compute what is frozen once for each image and keep it in memory; needs --augmentation none",
        group="fine-tuning",
        changeable=True,
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
    tracker: str = option(
        "tensorboard",
        "where metrics go besides the directory, separated by commas; wandb, mlflow and trackio stay on this machine "
        "unless their own variables say otherwise",
        group="run",
        metavar="|".join((*TRACKERS, NO_TRACKER)),
        check=Check(f"{NO_TRACKER}, or some of {', '.join(TRACKERS)}, separated by commas", are_trackers),
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
    long_tail: str = option(
        "exp",
        "how the classes of the subset shrink: exponentially, or in one step to the last half of them",
        group="data",
        metavar="|".join(PROFILES),
        choices=lambda: tuple(PROFILES),
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
