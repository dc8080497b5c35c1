"""Prepare data sets: ``python -m shike_fast.data check|describe|pack|synth``.

Exit status: 0 done, 1 something is wrong with the data, or the work could not be finished, 2 bad input.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from shike_fast._util.cli import ArgumentParser, run_command
from shike_fast._util.plugins import add_plugin_option, parse_with_plugins
from shike_fast.data.commands import check, describe, pack, synth

_COMMANDS = {"check": check, "describe": describe, "pack": pack, "synth": synth}


def make_parser() -> ArgumentParser:
    """The command line of ``shike_fast.data``."""
    parser = ArgumentParser(prog="python -m shike_fast.data", description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="check|describe|pack|synth")
    for name, module in _COMMANDS.items():
        summary = (module.__doc__ or "").partition("\n")[0]
        command = commands.add_parser(name, help=summary, description=module.__doc__)
        module.add_arguments(command)
        add_plugin_option(command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return run_command(lambda: _run(argparse.Namespace(**parse_with_plugins(make_parser, argv))))


def _run(arguments: argparse.Namespace) -> int:
    return _COMMANDS[arguments.command].run(arguments)


if __name__ == "__main__":
    sys.exit(main())
