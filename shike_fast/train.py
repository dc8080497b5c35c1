"""Train a multi-expert network on a long-tailed data set: ``python -m shike_fast.train --dataset NAME``.

Exit status: 0 finished, 1 training failed, 2 bad input (nothing was written), 128 + N stopped and saved on signal N.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from shike_fast import data, models
from shike_fast._util.cli import ArgumentParser, run_command
from shike_fast.data.longtail import SUBSETS
from shike_fast.engine.recipes import recipe_of
from shike_fast.engine.run import run


def make_parser() -> ArgumentParser:
    """The command line of ``shike_fast.train``; a setting that is not given does not appear in the parsed namespace."""
    parser = ArgumentParser(
        prog="python -m shike_fast.train",
        description=__doc__,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_recipe_table(),
    )
    add = parser.add_argument_group("data").add_argument
    add("--dataset", help=f"default digits-lt; one of {', '.join(data.datasets())}")
    add("--data-dir", metavar="DIR", help="where the data set lies")
    add("--download", action="store_true", help="fetch a missing data set into --data-dir")
    add(
        "--no-verify",
        dest="verify",
        action="store_false",
        help="accept files of another size or checksum than the published ones",
    )
    add("--imbalance-factor", type=float, metavar="IF", help="images of the largest class over those of the smallest")
    add(
        "--subset",
        metavar="|".join(SUBSETS),
        help="which images of a class are kept: first, in file order (default), or as the code of LDAM and RIDE does",
    )
    add("--augmentation", metavar="NAME", help="training transform; default the data set's own")
    add("--image-size", type=int, metavar="PX", help="side of the images, for data sets of image files (default 224)")
    add(
        "--loader",
        metavar="auto|cpu|gpu|device",
        help="cpu: processes decode, the device augments; gpu: it also decodes; device: images in memory stay there",
    )
    add("--workers", type=int, metavar="N", help="loader processes; default chosen for the data set")
    add("--strict", action="store_true", help="stop at an image file that cannot be read; default: replace it")

    add = parser.add_argument_group("method").add_argument
    add("--method", help="shike (default), or ce: one plain network with cross-entropy")
    add("--model", help=f"one of {', '.join(models.list_models())}")
    add("--experts", dest="num_experts", type=int, metavar="K", help="number of experts (default 3)")
    add("--pretrained", metavar="FILE|none", help="torchvision-named weights to start from (.pth or .safetensors)")
    add("--hardest-weight", type=float, metavar="ALPHA", help="weight of the hardest-negative term")
    add("--mutual-weight", type=float, metavar="BETA", help="weight of the mutual term")
    add("--scale", type=float, metavar="S", help="factor of the cosine classifiers")
    add("--kl-reduction", metavar="mean|batchmean", help="divide both by B*C (default) or by B")

    add = parser.add_argument_group("schedule").add_argument
    add("--epochs", type=int, metavar="N", help="epochs of both stages together")
    add("--stage2-epochs", type=int, metavar="N", help="those of them that re-train the classifiers")
    add("--batch-size", type=int, metavar="B", help="images of an optimizer step, in all processes together")
    add("--lr", type=float, help="highest learning rate of stage 1")
    add("--stage2-lr", type=float, help="highest learning rate of stage 2")
    add("--warmup-epochs", type=int, metavar="N")
    add("--weight-decay", type=float)
    add("--momentum", type=float, help="default 0.9")
    add("--amp", metavar="auto|off|bf16|fp16", help="mixed precision (default off); auto: what is fastest here")
    add("--accumulate", type=int, metavar="N", help="pass a process's share of a batch through in N parts")
    add("--seed", type=int, help="default 0")
    add("--deterministic", action="store_true", help="refuse operations that are not deterministic")
    add("--threads", type=int, metavar="N", help="CPU threads; default one a core, and one for digits-lt")
    add("--device", help="cpu, cuda or cuda:N; default cuda where there is one")

    add = parser.add_argument_group("speed").add_argument
    add("--compile", action="store_true", help="compile the network with torch.compile")
    add(
        "--cuda-graph",
        action=argparse.BooleanOptionalAction,
        help="record the step once and replay it; default for small images on one GPU",
    )
    add(
        "--channels-last",
        action=argparse.BooleanOptionalAction,
        help="keep the channels of a pixel together (default), for which the kernels are made",
    )
    add(
        "--checkpoint-activations",
        action="store_true",
        help="compute the blocks again in the backward pass instead of storing their insides: less memory, more time",
    )
    add("--optimizer", metavar="sgd|apex", help="PyTorch's fused SGD (default) or NVIDIA Apex's")
    add(
        "--sync-batch-norm",
        action="store_true",
        help="take BatchNorm's statistics over the images of all processes, not of each",
    )
    add("--profile", action="store_true", help="write a trace of ten steps and print what took the most time")

    add = parser.add_argument_group("run").add_argument
    add("--output-dir", type=_path, metavar="DIR", help="default runs/DATASET-METHOD-TIME")
    add(
        "--resume",
        nargs="?",
        type=_text,
        const=True,
        metavar="auto|FILE",
        help="go on with the run in --output-dir; auto: if there is one; FILE: from that checkpoint",
    )
    add("--save-every", type=int, metavar="STEPS", help="also save within an epoch, every so many steps")
    return parser


def _text(value: str) -> str:
    if not value:  # an unset variable of the user's script
        raise argparse.ArgumentTypeError("must not be empty")
    return value


def _path(value: str) -> Path:
    return Path(_text(value))


def _recipe_table() -> str:
    lines = ["defaults by data set:", f"  {'':18}model     epochs  batch  lr    weight decay  alpha  beta  scale"]
    for name, info in data.datasets().items():
        recipe = recipe_of(info)
        epochs = f"{recipe['epochs'] - recipe['stage2_epochs']}+{recipe['stage2_epochs']}"
        lines.append(
            f"  {name:18}{recipe['model']:10}{epochs:8}{recipe['batch_size']:<7}{recipe['lr']:<6g}"
            f"{recipe['weight_decay']:<14g}{recipe['hardest_weight']:<7g}{recipe['mutual_weight']:<6g}"
            f"{recipe['scale']:g}"
        )
    lines.append("your own data set: those of imagefolder, or, where its images have one size, of cifar100-lt")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return run_command(lambda: run(vars(make_parser().parse_args(argv))), prints_result=False)


if __name__ == "__main__":
    sys.exit(main())
