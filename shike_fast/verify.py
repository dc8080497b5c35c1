"""Verify the kernels on this machine: ``python -m shike_fast.verify``.

Each backend of a device is tried in a separate process: accuracy against float64, odd and unaligned sizes, values
that are not finite, writes outside of outputs, equal bits in two runs. What passes is timed beside the reference, and
from then on the fastest that passed runs where no backend is named. The verdicts are kept for this device, driver,
library, PyTorch and Triton.

With ``--full`` everything is tried anew, on every instruction set of a CPU, and more follows: times beside
``torch.compile``, and on a GPU the device tests and the memory checkers, from a checkout. Each part takes less than
eight minutes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from shike_fast import ops
from shike_fast._full_verification import PARTS, run_parts
from shike_fast._util.cli import ArgumentParser, choose_device, run_command
from shike_fast._util.files import atomic_write
from shike_fast.errors import ConfigError
from shike_fast.ops._verdicts import CRASHED, FAILED, TIMED_OUT, Verdict, Verdicts, machine, plain, verdict_file


def make_parser() -> ArgumentParser:
    """The command line of ``shike_fast.verify``."""
    parser = ArgumentParser(prog="python -m shike_fast.verify", description=__doc__)
    add = parser.add_argument
    add("--device", help="cpu, cuda or cuda:N; default all of this machine")
    add("--again", action="store_true", help="try what is known already, too")
    add("--seconds", type=float, default=20.0, metavar="S", help="for all backends of a device (default 20)")
    add("--full", nargs="*", metavar="PART", help=f"all parts, or some: {', '.join(PARTS)}")
    add("--output-dir", type=Path, metavar="DIR", help="of --full: for all that it finds (default: verification)")
    add("--json", action="store_true", help="print one JSON object, to attach to a report")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, or 1 where a backend failed, crashed or took too long."""
    return run_command(lambda: _verify(vars(make_parser().parse_args(argv))))


def _verify(arguments: dict[str, Any]) -> int:
    as_json, parts = arguments["json"], arguments["full"]
    if parts == []:
        parts = PARTS
    if arguments["seconds"] <= 0:
        raise ConfigError(f"--seconds: must be positive, got {arguments['seconds']:g}")
    if parts is None and arguments["output_dir"] is not None:
        raise ConfigError("--output-dir: only with --full")
    if unknown := set(parts or ()) - set(PARTS):
        raise ConfigError(f"--full: no part is called {sorted(unknown)[0]!r}; there are {', '.join(PARTS)}")
    again = arguments["again"] or "trials" in (parts or ())
    report: dict[str, Any] = {"file": str(verdict_file()), "devices": []}
    statuses = set()
    devices = _devices(arguments["device"])
    for device in devices:
        verdicts = ops.verify(device, again=again, seconds=arguments["seconds"])
        statuses |= {verdict.status for of_ops in verdicts.values() for verdict in of_ops.values()}
        report["devices"].append({"name": str(device), "machine": machine(device), "verdicts": plain(verdicts)})
        if not as_json:
            _show(device, verdicts)
    if not as_json:
        print(f"kept in {verdict_file()}")
    if parts is not None:
        folder = arguments["output_dir"] or Path("verification")
        report["parts"] = []
        for part in run_parts(parts, devices, folder, arguments["seconds"]):
            report["parts"].append(part._asdict())
            statuses.add(part.status)
            if not as_json:
                print(part.text(), flush=True)
            atomic_write(folder / "verification.json", json.dumps(report, indent=2).encode())
    if as_json:
        print(json.dumps(report, indent=2))
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
