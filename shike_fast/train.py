"""Train a multi-expert network on a long-tailed data set: ``python -m shike_fast.train --dataset NAME``.

Exit status: 0 finished, 1 training failed, 2 bad input (nothing was written), 128 + N stopped and saved on signal N.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from shike_fast import api, data, methods
from shike_fast._util.cli import ArgumentParser, run_command, told_once
from shike_fast._util.options import options_of
from shike_fast._util.plugins import load_plugins
from shike_fast.engine.config_file import settings_from
from shike_fast.engine.options import add_options
from shike_fast.engine.run import run
from shike_fast.engine.seeds import run_seeds


def make_parser() -> ArgumentParser:
    """The command line of ``shike_fast.train``; a setting that is not given does not appear in the parsed namespace."""
    parser = ArgumentParser(
        prog="python -m shike_fast.train",
        description=__doc__,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_recipe_table(),
    )
    add_options(parser)
    return parser


def _recipe_table() -> str:
    lines = ["defaults by data set:", f"  {'':18}model     epochs  batch  lr    weight decay  alpha  beta  scale"]
    usual = {name: one.default for name, one in options_of(methods.find_method("shike")).items()}
    for name, info in data.datasets().items():
        recipe = usual | dict(info.recipe)
        epochs = f"{recipe['epochs'] - recipe['stage2_epochs']}+{recipe['stage2_epochs']}"
        lines.append(
            f"  {name:18}{recipe['model']:10}{epochs:8}{recipe['batch_size']:<7}{recipe['lr']:<6g}"
            f"{recipe['weight_decay']:<14g}{recipe['hardest_weight']:<7g}{recipe['mutual_weight']:<6g}{recipe['scale']:g}"
        )
    lines.append("your own data set: those of imagefolder, or, where its images have one size, of cifar100-lt")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return run_command(lambda: _train(_given(argv)), prints_result=False)


def _train(given: dict[str, Any]) -> int:
    return run_seeds(given) if "seeds" in given else run(given)


def _given(argv: Sequence[str] | None) -> dict[str, Any]:
    """What the command line says, and what the file of ``--config`` does."""
    with told_once():
        plugins = load_plugins(argv)
        given = vars(make_parser().parse_args(argv)) | ({"plugins": plugins} if plugins else {})
        file: Path | None = given.pop("config", None)
        return given if file is None else settings_from(file, given)


class _Train(ModuleType):
    """This module, which is also the function ``shike_fast.train``."""

    __call__ = staticmethod(api.train)


if __name__ == "__main__":
    sys.exit(main())

sys.modules[__name__].__class__ = _Train
