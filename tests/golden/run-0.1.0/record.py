"""Recorded these runs with shike_fast 0.1.0: ``python record.py FOLDER``, one thread, on a CPU.

``shike`` and ``ce`` are whole runs. Beside each lies the ``last.pt`` of a run that was stopped, named after the stage
in which it was, with what ``shike_fast.evaluate`` said of it and of ``best.pt``.
"""

import contextlib
import io
import json
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from shike_fast import models
from shike_fast.engine import trainer
from shike_fast.evaluate import main as evaluate
from shike_fast.models import BasicBlock, MultiExpertResNet
from shike_fast.train import main as train

COMMON = ["--dataset", "digits-lt", "--model", "tiny", "--batch-size", "64", "--device", "cpu", "--threads", "1"]
RUNS = {
    "shike": (["--experts", "2", "--epochs", "4", "--stage2-epochs", "2"], {"stage1": 9, "stage2": 15}),
    "ce": (["--method", "ce", "--epochs", "2"], {"stage1": 9}),
}


@models.register_model
def tiny(**options):
    return MultiExpertResNet(BasicBlock, (1, 1), width=4, large_stem=False, **options)


def stopped_after(steps, arguments):
    plain, left = trainer.Trainer._step, [steps]

    def counted(self, *batch):
        plain(self, *batch)
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer.Trainer._step = counted
    try:
        assert train(arguments) == 128 + signal.SIGTERM
    finally:
        trainer.Trainer._step = plain


def result_of(checkpoint, folder):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert evaluate(["--checkpoint", str(checkpoint), "--json", "--csv", str(folder / "table.csv")]) == 0
    result = json.loads(printed.getvalue())
    return {name: value for name, value in result.items() if name not in ("checkpoint", "csv")}


def main(target):
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        for method, (arguments, stops) in RUNS.items():
            whole, out = scratch / method, target / method
            out.mkdir()
            assert train([*COMMON, *arguments, "--output-dir", str(whole)]) == 0
            for file in ("config.json", "metrics.jsonl", "best.pt"):
                shutil.copy(whole / file, out / file)
            results = {"best.pt": result_of(out / "best.pt", scratch)}
            for stage, steps in stops.items():
                directory = scratch / f"{method}-{stage}"
                stopped_after(steps, [*COMMON, *arguments, "--output-dir", str(directory)])
                shutil.copy(directory / "last.pt", out / f"{stage}.pt")
                results[f"{stage}.pt"] = result_of(out / f"{stage}.pt", scratch)
            (out / "evaluated.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
