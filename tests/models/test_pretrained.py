"""torchvision-named weight files into the shared stages and every expert."""

import pickle
import re

import pytest
import safetensors.torch
import torch

from shike_fast import models
from shike_fast.errors import CheckpointError


def plain_weights(seed=1):
    """What a torchvision network of this form would save: one last stage called layer3, and fc."""
    torch.manual_seed(seed)
    plain = models.create_model("resnet8", num_classes=10, num_experts=1, fusion=False)
    weights = {
        re.sub(r"^experts\.0\.", "layer3.", key): torch.randn_like(value) if value.is_floating_point() else value + 7
        for key, value in plain.state_dict().items()
        if "classifiers" not in key
    }
    return {**weights, "fc.weight": torch.randn(1000, 64), "fc.bias": torch.randn(1000)}


def save(weights, path):
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(weights, path)
    else:
        torch.save(weights, path)
    return path


@pytest.mark.parametrize("file", ["weights.pth", "weights.safetensors"])
def test_loads_shared_stages_and_every_expert(tmp_path, file):
    weights = plain_weights()
    model = models.create_model("resnet8", num_classes=10)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = models.load_pretrained(model, save(weights, tmp_path / file))

    after = model.state_dict()
    assert torch.equal(after["layer2.0.downsample.0.weight"], weights["layer2.0.downsample.0.weight"])
    for k in range(3):
        assert torch.equal(after[f"experts.{k}.0.conv2.weight"], weights["layer3.0.conv2.weight"])
        assert torch.equal(after[f"experts.{k}.0.bn2.running_var"], weights["layer3.0.bn2.running_var"])
        assert after[f"experts.{k}.0.bn2.num_batches_tracked"] == 7
    assert set(report.ignored) == {"fc.weight", "fc.bias"}
    assert set(report.loaded) | set(report.untouched) == set(after)
    assert not set(report.loaded) & set(report.untouched)
    for key in report.untouched:
        assert key.startswith(("fusions.", "classifiers.", "rt_classifiers."))
        assert torch.equal(after[key], before[key])


def test_experts_do_not_share_storage_after_loading(tmp_path):
    model = models.create_model("resnet8", num_classes=10)
    models.load_pretrained(model, save(plain_weights(), tmp_path / "weights.pth"))
    with torch.no_grad():
        model.experts[0][0].conv1.weight.zero_()
    assert model.experts[1][0].conv1.weight.abs().sum() > 0


def test_old_files(tmp_path):
    """torchvision's first weights: no counters, the format before zip archives."""
    weights = {k: v for k, v in plain_weights().items() if not k.endswith("num_batches_tracked")}
    torch.save(weights, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    model = models.create_model("resnet8", num_classes=10)
    report = models.load_pretrained(model, tmp_path / "old.pth")
    assert "bn1.num_batches_tracked" in report.untouched
    assert torch.equal(model.conv1.weight, weights["conv1.weight"])


def test_dataparallel_prefix_and_dtype(tmp_path):
    weights = {f"module.{k}": v.half() if v.is_floating_point() else v for k, v in plain_weights().items()}
    model = models.create_model("resnet8", num_classes=10)
    models.load_pretrained(model, save(weights, tmp_path / "weights.pth"))
    assert model.conv1.weight.dtype == torch.float32
    assert torch.equal(model.conv1.weight, weights["module.conv1.weight"].float())


def test_resnet152_takes_torchvision_names(tmp_path):
    """Names as torchvision writes them; a sample from each part of its resnet152."""
    with torch.device("meta"):
        model = models.create_model("resnet152", num_classes=365)
        single = models.create_model("resnet152", num_classes=365, num_experts=1, fusion=False)
    weights = {
        re.sub(r"^experts\.0\.", "layer4.", key): torch.empty((), dtype=value.dtype).expand(value.shape)
        for key, value in single.state_dict().items()
        if "classifiers" not in key
    }
    assert {"layer3.35.conv3.weight", "layer4.0.downsample.1.bias", "layer1.0.downsample.0.weight"} <= weights.keys()
    torch.save(weights, tmp_path / "resnet152.pth")
    report = models.load_pretrained(model, tmp_path / "resnet152.pth")
    assert sum(key.startswith("experts.") for key in report.loaded) == 3 * sum(k.startswith("layer4.") for k in weights)


def test_a_mismatch_lists_the_keys_and_loads_nothing(tmp_path):
    weights = plain_weights()
    del weights["layer1.0.conv1.weight"]
    weights["layer4.0.conv1.weight"] = torch.zeros(1)
    weights["layer3.0.bn1.bias"] = torch.zeros(3)
    file = save(weights, tmp_path / "weights.pth")
    model = models.create_model("resnet8", num_classes=10)
    before = model.conv1.weight.clone()
    with pytest.raises(CheckpointError) as error:
        models.load_pretrained(model, file)
    message = str(error.value)
    assert message.startswith(str(file))
    assert "missing keys: layer1.0.conv1.weight;" in message
    assert "unknown keys: layer4.0.conv1.weight;" in message
    assert message.endswith("wrong shapes: layer3.0.bn1.bias is [3], expected [64]")
    assert torch.equal(model.conv1.weight, before)


def test_other_image_channels_are_a_shape_error(tmp_path):
    model = models.create_model("resnet8", num_classes=10, in_channels=1)
    with pytest.raises(CheckpointError, match=r"conv1.weight is \[16, 3, 3, 3\], expected \[16, 1, 3, 3\]"):
        models.load_pretrained(model, save(plain_weights(), tmp_path / "weights.pth"))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kept", [0, 10, 1000, -100])
def test_truncated_file(tmp_path, suffix, kept):
    file = save(plain_weights(), tmp_path / f"weights{suffix}")
    file.write_bytes(file.read_bytes()[:kept])
    model = models.create_model("resnet8", num_classes=10)
    with pytest.raises(CheckpointError, match=rf"weights{suffix}: cannot be read as weights \(.+\)") as error:
        models.load_pretrained(model, file)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_missing_file(tmp_path, suffix):
    model = models.create_model("resnet8", num_classes=10)
    with pytest.raises(CheckpointError, match=rf"--pretrained: .*absent{suffix} is not a file"):
        models.load_pretrained(model, tmp_path / f"absent{suffix}")


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize(
    "writer",
    [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))],
    ids=["torch", "pickle"],
)
def test_no_pickled_code_runs(tmp_path, writer):
    file, mark = tmp_path / "weights.pth", tmp_path / "executed"
    writer({"conv1.weight": Payload(mark)}, file)
    with pytest.raises(CheckpointError, match=r"weights\.pth: holds more than tensors, or is no weight file"):
        models.load_pretrained(models.create_model("resnet8", num_classes=10), file)
    assert not mark.exists()


def test_a_checkpoint_of_something_else(tmp_path):
    file = tmp_path / "weights.pth"
    torch.save({"epoch": 1, "state_dict": plain_weights()}, file)
    with pytest.raises(CheckpointError, match=r"weights.pth: expected a state_dict .* 'epoch' is of type int"):
        models.load_pretrained(models.create_model("resnet8", num_classes=10), file)
