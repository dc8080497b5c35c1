"""The benchmarks' peer computes what the published code recorded, and the ways to run the experts one function."""

import copy
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from shike_fast import models
from shike_fast.models.resnet import Bottleneck, MultiExpertResNet

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def load(name):
    specification = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def peer():
    return load("peer")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def recorded(golden, peer):
    """The recorded network, its arrays, images and labels."""
    arrays = golden("resnet8_moe")
    network = peer.resnet8(len(arrays["class_counts"])).double()
    state = {key.removeprefix("state/"): torch.from_numpy(arrays[key]) for key in arrays if key.startswith("state/")}
    network.load_state_dict(state, strict=True)
    return network, arrays, torch.from_numpy(arrays["images"]).double(), torch.from_numpy(arrays["target"])


@pytest.mark.parametrize(("stage", "key"), [(1, "eval_logits"), (2, "eval_logits_stage2")])
def test_recorded_logits(recorded, stage, key):
    network, arrays, images, _ = recorded
    with torch.no_grad():
        logits = torch.stack(network.eval()(images, stage=stage))
    torch.testing.assert_close(logits, torch.from_numpy(arrays[key]), rtol=0, atol=1e-12)


def test_recorded_losses(recorded, peer):
    network, arrays, images, target = recorded
    optimizer = peer.make_optimizer(network, lr=0.05)
    losses = []
    for _ in arrays["train_losses"]:
        loss = peer.dkt_loss(network(images), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    np.testing.assert_allclose(losses, arrays["train_losses"], rtol=0, atol=1e-9)


def test_bottlenecks_are_the_same_network(peer):
    """The form of ResNet-50, with one narrow block a stage."""
    options = {"width": 8, "num_classes": 5, "large_stem": True}
    network = peer.PeerNetwork(peer.Bottleneck, [1, 1, 1, 2], **options).double()
    model = MultiExpertResNet(Bottleneck, [1, 1, 1, 2], **options).double()
    state = {}
    for key, values in model.state_dict().items():
        theirs = key.replace("experts.", "layer4s.").replace(".downsample.", ".shortcut.")
        if key.startswith("fusions."):
            _, k, kind, i, name = key.split(".")
            theirs = f"shallow_exps.{k}.convs.StridedConv{i}.conv.{0 if kind == 'convs' else 1}.{name}"
        if "classifiers" in key:
            state |= {key.replace("weight", f"{k}.weight"): weight for k, weight in enumerate(values)}
        else:
            state[theirs] = values
    network.load_state_dict(state, strict=True)
    images = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(torch.stack(network(images)), model(images))


def test_resnet50_is_the_large_network(peer):
    with torch.device("meta"):
        theirs, ours = peer.resnet50(7), models.create_model("resnet50", num_classes=7)
    sizes = [sum(parameter.numel() for parameter in network.parameters()) for network in (theirs, ours)]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("workers", [0, 1])
def test_batches(peer, workers):
    images = np.zeros((5, 32, 32, 3), dtype=np.uint8)
    dataset = peer.AugmentedImages(images, np.arange(5), mean=(0.2,) * 3, std=(0.5,) * 3)
    dataset.transforms = (peer.random_flip,)
    batches = peer.batches(dataset, batch_size=2, workers=workers, pin_memory=False)
    seen = [next(batches) for _ in range(4)]  # two of the first epoch, two of the second
    batches.close()
    for batch, labels in seen:
        assert (batch.shape, batch.dtype, labels.dtype) == ((2, 3, 32, 32), torch.float32, torch.int64)
        torch.testing.assert_close(batch, torch.full_like(batch, -0.4))  # black, in the hole and outside
    assert len({int(label) for _, labels in seen[:2] for label in labels}) == 4


def test_transforms(peer):
    dataset = peer.AugmentedImages(
        np.random.default_rng(0).integers(1, 256, size=(40, 32, 32, 3), dtype=np.uint8),
        np.zeros(40, dtype=np.int64),
        mean=(0.0,) * 3,
        std=(1.0,) * 3,
    )
    assert dataset.transforms == (peer.random_crop, peer.random_flip, peer.auto_augment)
    images = torch.stack([dataset[i][0] for i in range(len(dataset))])
    assert images.min() >= 0 and images.max() <= 1
    dataset.transforms = ()
    holes = torch.stack([(dataset[i][0] == 0).all(0).sum() for i in range(len(dataset))])
    assert holes.min() >= 8 * 8 and holes.max() == 16 * 16


@pytest.mark.parametrize("name", ["resnet8", "resnet50"])
def test_ways_to_run_the_experts_agree(name):
    experts = load("bench_experts")
    if name == "resnet8":
        model = models.create_model("resnet8", num_classes=5)
    else:
        model = MultiExpertResNet(Bottleneck, [1, 2], width=8, num_classes=5, large_stem=True)
    stages = [stage.double() for stage in model.experts]
    x = torch.rand(4, 32, 8, 8, dtype=torch.float64, requires_grad=True)
    gradient = torch.randn_like(experts.separate(copy.deepcopy(stages))(x))
    results = {
        way: experts.forward_backward(run, x, gradient)
        for way, (run, _) in experts.ways(stages, torch.device("cpu")).items()
    }
    assert len(results) == (3 if name == "resnet8" else 4)
    for way, result in results.items():
        torch.testing.assert_close(result, results["separate"], msg=way)
