"""Verify the kernels on this machine: ``python -m shike_fast.verify``.

Each backend of a device is tried in a process of its own: accuracy against float64, odd and unaligned sizes, values
that are not finite, writes outside of outputs, equal bits in two runs. What passes is timed beside the reference, and
from then on the fastest that passed runs where no backend is named. The verdicts are kept for this device, driver,
library, PyTorch and Triton.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import torch

from shike_fast import ops
from shike_fast._util.cli import ArgumentParser, choose_device, run_command
from shike_fast.errors import ConfigError
from shike_fast.ops._verdicts import CRASHED, FAILED, TIMED_OUT, Verdict, Verdicts, machine, plain, verdict_file


def make_parser() -> ArgumentParser:
    """The command line of ``shike_fast.verify``."""
    parser = ArgumentParser(prog="python -m shike_fast.verify", description=__doc__)
    add = parser.add_argument
    add("--device", help="cpu, cuda or cuda:N; default all of this machine")
    add("--again", action="store_true", help="try what is known already, too")
    add("--seconds", type=float, default=20.0, metavar="S", help="for all operators of a backend (default 20)")
    add("--json", action="store_true", help="print one JSON object, to attach to a report")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, or 1 where a backend failed, crashed or took too long."""
    return run_command(lambda: _verify(vars(make_parser().parse_args(argv))))


def _verify(arguments: dict[str, Any]) -> int:
    if arguments["seconds"] <= 0:
        raise ConfigError(f"--seconds: must be positive, got {arguments['seconds']:g}")
    report, statuses = [], set()
    for device in _devices(arguments["device"]):
        verdicts = ops.verify(device, again=arguments["again"], seconds=arguments["seconds"])
        statuses |= {verdict.status for of_ops in verdicts.values() for verdict in of_ops.values()}
        report.append({"name": str(device), "machine": machine(device), "verdicts": plain(verdicts)})
        if not arguments["json"]:
            _show(device, verdicts)
    if arguments["json"]:
        print(json.dumps({"file": str(verdict_file()), "devices": report}, indent=2))
    else:
        print(f"kept in {verdict_file()}")
    return 1 if statuses & {FAILED, CRASHED, TIMED_OUT} else 0


def _devices(name: str | None) -> list[torch.device]:
    if name is not None:
        return [choose_device(name)]
    return [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]


def _show(device: torch.device, verdicts: Verdicts) -> None:
    print(f"{device}: {machine(device)['device']}")
    for backend, of_ops in verdicts.items():
        for operator, verdict in of_ops.items():
            print(f"  {backend:<6} {operator:<21} {_words(verdict)}")
    for line in ops.what_runs(device):
        print(f"  {line}")


def _words(verdict: Verdict) -> str:
    if verdict.reason:
        return f"{verdict.status}: {verdict.reason}"
    gain = verdict.gain()
    return verdict.status if gain is None else f"{verdict.status}, {gain:.1f} times the reference"


if __name__ == "__main__":
    sys.exit(main())
