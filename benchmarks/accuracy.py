"""Accuracy of the fast path against the plain one, several seeds each: ``python benchmarks/accuracy.py NAME``.

``fast`` is the command ``python -m shike_fast.train`` as it is by default: fused operators, maps channels-last, images
augmented in batches on the training device, fused optimizer; on a GPU the step recorded as a CUDA graph. ``fast, bf16``
is that with ``--amp bf16``.

``plain`` is benchmarks/peer.py: the published network, its losses in eager PyTorch, maps in NCHW, PyTorch's plain
SGD; images augmented on the host. Both have one recipe: epochs, learning rates, batches, weights of the loss's terms.
They share no initial weights, so each pair of runs differs by chance as two seeds do.

The result, ``benchmarks/results/fast_against_plain/NAME.json``, is what docs/records/benchmarks.md shows of it.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import measured_on
import peer
import torch

import shike_fast.train
from shike_fast import data
from shike_fast.data.shots import SHOTS
from shike_fast.engine.config import TrainConfig, resolve
from shike_fast.engine.metrics import evaluate
from shike_fast.engine.state import load_data

RESULTS = Path(__file__).parent / "results" / "fast_against_plain"
MEASURES = ("top1", *SHOTS)
PATHS = {"fast": "off", "fast, bf16": "bf16", "plain": None}


def fast(arguments: list[str], seed: int) -> dict[str, Any]:
    """The last line of metrics.jsonl of a run by the command."""
    with tempfile.TemporaryDirectory() as folder:
        status = shike_fast.train.main([*arguments, "--seed", str(seed), "--output-dir", folder])
        if status != 0:
            raise SystemExit(status)
        return json.loads((Path(folder) / "metrics.jsonl").read_text().splitlines()[-1])


class _Stacked(torch.nn.Module):
    """A published network that gives one tensor [K, B, C]."""

    def __init__(self, network: peer.PeerNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor, stage: int) -> torch.Tensor:
        return torch.stack(self.network(images, stage=stage))


def plain(config: TrainConfig, dataset: data.LongTailData, device: torch.device) -> dict[str, Any]:
    """The same measures of a run of the published loop."""
    torch.manual_seed(config.seed)
    network = getattr(peer, config.model)(dataset.num_classes, dataset.in_channels).to(device)
    train = data.Loader(dataset.train, batch_size=config.batch_size, shuffle=True, seed=config.seed)
    counts = dataset.class_counts.to(device)
    optimizer = peer.make_optimizer(network, lr=0.0)
    for epoch in range(config.epochs):
        stage = config.stage_of(epoch)
        if stage == 2 and epoch == config.stage1_epochs:
            network.requires_grad_(False)
            optimizer = peer.make_optimizer(network.rt_classifiers.requires_grad_(True), lr=0.0)
        for group in optimizer.param_groups:
            group["lr"] = config.lr_of(epoch)
        for images, labels in train.epoch(epoch):
            images, labels = images.to(device), labels.to(device)
            logits = network(images, stage=stage)
            if stage == 1:
                loss = peer.dkt_loss(logits, labels, config.hardest_weight, config.mutual_weight)
            else:
                loss = peer.balanced_softmax_loss(logits, labels, counts)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"plain, seed {config.seed}, epoch {epoch + 1}: loss {loss.item():.3f}", flush=True)
    test = data.Loader(dataset.test, batch_size=4 * config.batch_size, shuffle=False)
    last = config.stage_of(config.epochs - 1)
    result = evaluate(_Stacked(network), test.epoch(0), stage=last, class_counts=counts, device=device)
    return {"top1": result.top1, **result.shots()}


def summary(values: list[float]) -> dict[str, Any]:
    """Mean and its standard error."""
    return {
        "values": values,
        "mean": statistics.mean(values),
        "standard_error": statistics.stdev(values) / len(values) ** 0.5,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the result's file")
    parser.add_argument("--dataset", default="fashion-mnist-lt")
    parser.add_argument("--data-dir")
    parser.add_argument("--model", default="resnet8")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--stage2-epochs", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = vars(parser.parse_args())
    name, seeds = options.pop("name"), range(options.pop("seeds"))
    fixed = {"scale": peer.SCALE, "weight_decay": peer.WEIGHT_DECAY}  # in the plain path
    settings = fixed | {key: value for key, value in options.items() if value is not None}
    arguments = [text for key, value in settings.items() for text in (f"--{key.replace('_', '-')}", str(value))]
    rows: dict[str, list[dict[str, Any]]] = {path: [] for path in PATHS}
    seconds: dict[str, list[float]] = {path: [] for path in PATHS}
    for seed in seeds:
        config = resolve(settings | {"seed": seed})
        dataset = load_data(config)
        device = torch.device(options["device"])
        for path, amp in PATHS.items():
            begin = time.process_time()
            row = plain(config, dataset, device) if amp is None else fast([*arguments, "--amp", amp], seed)
            seconds[path].append(round(time.process_time() - begin, 1))
            rows[path].append({measure: row[measure] for measure in MEASURES})
            print(path, seed, rows[path][-1], flush=True)
    measured = [measure for measure in MEASURES if rows["fast"][0][measure] is not None]
    record = {
        "settings": {key: value for key, value in settings.items() if key != "data_dir"},
        "seeds": list(seeds),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": measured_on.commit(),
        "cpu_seconds": seconds,
        "paths": {
            path: {measure: summary([row[measure] for row in rows[path]]) for measure in measured} for path in rows
        },
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for path, measures in record["paths"].items():
        told = (f"{m} {v['mean']:.2f} ± {v['standard_error']:.2f}" for m, v in measures.items())
        print(f"{path}: {', '.join(told)}")


if __name__ == "__main__":
    main()
