"""The benchmark of frozen networks times what it says: each way steps, and the cached ones need no trunk."""

import importlib.util
import sys
import time
from pathlib import Path

import torch

BENCH = Path(__file__).resolve().parents[2] / "benchmarks" / "bench_frozen.py"


def test_all_ways_step(monkeypatch):
    specification = importlib.util.spec_from_file_location("bench_frozen", BENCH)
    bench = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "bench_frozen", bench)  # where its dataclass looks for itself
    specification.loader.exec_module(bench)
    case = bench.Case("resnet8", 4, 2, steps=1)
    losses = {}
    for name, settings in bench.WAYS.items():
        contender = bench.Contender(case, torch.device("cpu"), time.perf_counter, **settings)
        for _ in range(3):
            contender.step()
        losses[name] = float(contender.totals.sums[0])
        assert contender.facts.keys() == ({"filling_seconds", "cache_bytes"} if "cached" in name else set())
    for name in ("trunk frozen", "all but classifiers frozen"):
        torch.testing.assert_close(losses[f"{name}, cached"], losses[name], rtol=1e-4, atol=0)
