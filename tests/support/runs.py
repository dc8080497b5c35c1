"""Runs of the training command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from programs import Programs

from shike_fast.train import main

# the smallest run that still has two stages: one expert stage of resnet8 on digits
SMALL = ["--model", "resnet8", "--batch-size", "64", "--epochs", "3", "--stage2-epochs", "1"]


class Runs:
    """Runs the training command in this process or in another one, below a temporary directory."""

    small = SMALL

    def __init__(self, root: Path, programs: Programs) -> None:
        self.root = root
        self.programs = programs

    def train(self, *arguments: object) -> int:
        return main([str(argument) for argument in arguments])

    def start(self, *arguments: object, **options: object) -> subprocess.Popen:
        command = [sys.executable, "-m", "shike_fast.train", *arguments]
        # one thread: the same rounding as a run in any other process, however busy the machine is
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return self.programs.start(command, cwd=self.root, env=environment, **options)

    @staticmethod
    def metrics(directory: Path) -> list[dict]:
        return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]

    @staticmethod
    def epochs(directory: Path) -> int:
        """How many epochs a run that is going on has finished: its last line may be there in part."""
        path = directory / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    @classmethod
    def reproducible_metrics(cls, directory: Path) -> list[dict]:
        return [
            {k: v for k, v in row.items() if k not in ("images_per_second", "seconds")}
            for row in cls.metrics(directory)
        ]

    @staticmethod
    def checkpoint(path: Path) -> dict:
        return torch.load(path, weights_only=True)

    @classmethod
    def assert_same_weights(cls, one: Path, other: Path) -> None:
        """Of the model, and of their moving average where a run keeps one."""
        first, second = cls.checkpoint(one), cls.checkpoint(other)
        pairs = [(first["model"], second["model"])]
        if "average" in first or "average" in second:
            assert first["average"]["steps"] == second["average"]["steps"]
            pairs.append((first["average"]["model"], second["average"]["model"]))
        for mine, theirs in pairs:
            assert mine.keys() == theirs.keys()
            assert not [name for name in mine if not torch.equal(mine[name], theirs[name])]
