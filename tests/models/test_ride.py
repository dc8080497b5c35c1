"""Weights under the names of RIDE's code: equal logits and gradients, the network they are of, and what is refused."""

import warnings

import pytest
import torch
from ride_network import Form, logits, make_state_dict
from torch.func import functional_call

from shike_fast import models
from shike_fast.errors import CheckpointError
from shike_fast.models import registry

LARGE = {"blocks": (3, 4, 6, 3), "shared": 2, "expansion": 4, "large": True, "shortcut": "downsample", "experts": 2}
FORMS = {
    "RIDE, CIFAR": Form(),
    "linear heads": Form(cosine=False),
    "BalPoE: full width": Form(factor=1.0, experts=2, classes=7),
    "projection": Form(factor=1.0, shortcut="shortcut", cosine=False),
    "one stage each": Form(shared=2, channels=1),
    "deeper": Form(blocks=(3, 3, 3), experts=2),
    "large, basic blocks": Form(blocks=(1, 1, 1, 1), width=64, shared=2, large=True, shortcut="downsample"),
    "large, shared third stage": Form(**LARGE | {"shared": 3}, width=8, factor=1.0, cosine=False, width_per_group=64),
    "large, bottlenecks": Form(**LARGE, width=8),
    "large, groups": Form(**LARGE, width=16, groups=8, width_per_group=16),
}


@pytest.fixture(autouse=True)
def _small_networks(monkeypatch):
    """The large form with few channels, registered before the others: 64 would take long."""
    others = registry._BUILDERS
    monkeypatch.setattr(registry, "_BUILDERS", {})

    @models.register_model
    def narrow(**options):
        return models.MultiExpertResNet(models.Bottleneck, (3, 4, 6, 3), width=8, large_stem=True, **options)

    @models.register_model
    def narrow_groups(**options):
        def block(*args, **settings):
            return models.Bottleneck(*args, groups=8, width_per_group=16, **settings)

        return models.MultiExpertResNet(block, (3, 4, 6, 3), width=16, large_stem=True, **options)

    registry._BUILDERS.update(others)


def imported(state):
    model = models.create_model(**models.describe_ride_state_dict(state)).double()
    model.load_state_dict(models.convert_ride_state_dict(state))
    return model


def some_images(form):
    size = (2, form.channels, 65, 64) if form.large else (4, form.channels, 16, 18)
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", FORMS)
def test_equal_logits_from_both_sets_of_heads(name):
    form = FORMS[name]
    state = make_state_dict(form)
    model = imported(state).eval()
    images = some_images(form)
    expected = logits(form, state, images)
    assert expected.std() > 0.1
    with torch.no_grad():
        for stage in (1, 2):
            torch.testing.assert_close(model(images, stage=stage), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["RIDE, CIFAR", "linear heads", "projection", "large, basic blocks", "large, groups"])
def test_equal_gradients_in_training_mode(name):
    form = FORMS[name]
    state = make_state_dict(form)
    model = imported(state).train()
    trained = {key for key in state if not key.endswith(("running_mean", "running_var", "num_batches_tracked"))}
    images = some_images(form)
    gradients = []
    for mine in (True, False):
        values = {key: value.clone().requires_grad_(key in trained) for key, value in state.items()}
        if mine:
            out = functional_call(model, models.convert_ride_state_dict(values), (images,))
        else:
            out = logits(form, values, images, training=True)
        weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
        names = sorted(trained)
        grads = torch.autograd.grad((out * weight).sum(), [values[key] for key in names])
        gradients.append(dict(zip(names, grads, strict=True)))
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][key], rtol=1e-7, atol=1e-8, msg=key)


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        (Form(blocks=(5, 5, 5), classes=100), {"name": "resnet32", "shortcut": "pad", "expert_width": 0.75}),
        (FORMS["BalPoE: full width"], {"name": "resnet8", "num_classes": 7, "num_experts": 2, "expert_width": 1.0}),
        (FORMS["linear heads"], {"classifier": "linear", "scale": 30.0, "fusion": False}),
        (FORMS["one stage each"], {"expert_stages": 1, "in_channels": 1, "classifier": "cosine"}),
        (FORMS["projection"], {"shortcut": "projection", "expert_stages": 2}),
        (FORMS["large, basic blocks"], {"name": "resnet10", "shortcut": "projection", "expert_width": 0.75}),
        (FORMS["large, groups"], {"name": "narrow_groups", "expert_stages": 2}),
        (Form(**LARGE, width=64, classes=12), {"name": "resnet50", "num_classes": 12}),
        (Form(**LARGE, width=64, groups=32, width_per_group=4), {"name": "resnext50_32x4d", "num_experts": 2}),
    ],
)
def test_the_network_is_described(form, expected):
    with torch.device("meta"):
        state = {key: torch.empty(value.shape) for key, value in make_state_dict(form).items()}
        described = models.describe_ride_state_dict(state)
        model = models.create_model(**described)
    assert {key: described[key] for key in expected} == expected
    converted = models.convert_ride_state_dict(state)
    assert {key: value.shape for key, value in converted.items()} == {
        key: value.shape for key, value in model.state_dict().items()
    }


@pytest.mark.parametrize("prefix", ["backbone.", "module.backbone."])
def test_what_the_published_scripts_save(tmp_path, prefix):
    state = make_state_dict(Form())
    weights = {f"{prefix}{key}": value for key, value in state.items()}
    saved = {"arch": "ResNet32Model", "epoch": 200, "state_dict": weights, "monitor_best": 0.48, "optimizer": {}}
    torch.save(saved, tmp_path / "model_best.pth")
    loaded = torch.load(tmp_path / "model_best.pth", weights_only=True)
    expected = models.convert_ride_state_dict(state)
    converted = models.convert_ride_state_dict(loaded)
    assert models.describe_ride_state_dict(loaded) == models.describe_ride_state_dict(state)
    assert converted.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in converted.items())
    assert converted["classifiers.weight"].data_ptr() != converted["rt_classifiers.weight"].data_ptr()


@pytest.mark.parametrize(
    "extra",
    [
        {"expert_help_pred_hidden_fcs.0.weight": (16, 48), "expert_help_pred_fc.bias": (1,)},
        {"expert_help_pred_fcs.1.weight": (1, 21)},
        {"linear_head.weight": (48, 10), "linear_few.weight": (48, 10), "mlp.0.weight": (16, 16)},
    ],
    ids=["RIDE's router", "its other form", "MDCS's other heads"],
)
def test_what_is_left_out_is_named(extra):
    state = make_state_dict(Form())
    expected = models.convert_ride_state_dict(state)
    more = {f"backbone.{key}": value for key, value in state.items()}
    more |= {f"backbone.{key}": torch.zeros(shape) for key, shape in extra.items()}
    with pytest.warns(UserWarning, match=f"convert_ride_state_dict: left out {', '.join(extra)}$"):
        converted = models.convert_ride_state_dict(more)
    assert all(torch.equal(value, expected[key]) for key, value in converted.items())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert models.describe_ride_state_dict(more) == models.describe_ride_state_dict(state)


def test_every_value_arrives_and_no_random_number_is_drawn():
    state = make_state_dict(Form(cosine=False))
    before = torch.get_rng_state()
    models.describe_ride_state_dict(state)
    converted = models.convert_ride_state_dict(state)
    assert torch.equal(torch.get_rng_state(), before)
    once = {key: value for key, value in converted.items() if not key.startswith("rt_")}
    assert sum(v.numel() for v in once.values()) == sum(v.numel() for v in state.values())
    assert torch.equal(once["experts.1.layer3.0.conv2.weight"], state["layer3s.1.0.conv2.weight"])
    assert torch.equal(once["classifiers.weight"][2], state["linears.2.weight"].t())


def changed(**changes):
    state = make_state_dict(Form())
    for key, value in changes.items():
        if value is None:
            del state[key]
        else:
            state[key] = value
    return state


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "got an empty dict"),
        ({"state_dict": {}}, "'state_dict' is an empty dict"),
        (changed(**{"layer3s.1.0.bn1.weight": None}), r"missing keys: layer3s\.1\.0\.bn1\.weight$"),
        (changed(**{"layer9.extra": torch.zeros(1)}), r"unknown keys: layer9\.extra$"),
        (changed(**{"extra.weight": torch.zeros(1)}), "unknown keys: extra.weight$"),
        (changed(**{"linears.1.weight": torch.zeros(48, 11)}), r"linears.1.weight is \[48, 11\], expected \[48, 10\]"),
        (changed(**{"conv1.weight": None}), r"weights of another network, it has no conv1\.weight of 4"),
        (changed(**{"linears.0.weight": torch.zeros(47, 10)}), "a network that cannot be built here: expert_width"),
        (changed(**{"linears.0.weight": torch.zeros(3)}), r"it has no linears\.0\.weight of 2 sizes$"),
        (
            {
                "conv1.weight": torch.zeros(16, 3, 3, 3),
                "layer3.0.conv1.weight": torch.zeros(1),
                "linear.weight": torch.zeros(64, 10),
            },
            "a network of one expert .*; only one of several experts, with layer3s or layer4s and linears",
        ),
        ({"conv1.weight": torch.zeros(16, 3, 3, 3)}, "another network; only one of several experts"),
        ({"conv1.weight": torch.zeros(16, 3, 3, 3)} | {"layer1s.0.0.conv1.weight": torch.zeros(1)}, "another network"),
        (changed(**{"layer1.0.conv2.weight": torch.zeros(16, 0, 3, 3)}), r"it has no layer1\.0\.conv2\.weight of 4"),
        (make_state_dict(Form(classes=1)), "cannot be built here: num_classes must be at least 2, got 1"),
    ],
)
@pytest.mark.parametrize("function", [models.convert_ride_state_dict, models.describe_ride_state_dict])
def test_what_is_refused(function, state, message):
    with pytest.raises(CheckpointError, match=f"^{function.__name__}: .*{message}") as error:
        function(state)
    assert "\n" not in str(error.value)


def test_a_network_that_is_not_registered_converts_all_the_same():
    form = Form(blocks=(2, 3, 2), width=8)
    state = make_state_dict(form)
    with pytest.raises(CheckpointError, match=r"no registered network has blocks of this kind, \(2, 3, 2\) a stage"):
        models.describe_ride_state_dict(state)
    model = models.MultiExpertResNet(
        models.BasicBlock,
        form.blocks,
        width=8,
        large_stem=False,
        num_classes=10,
        fusion=False,
        expert_stages=2,
        expert_width=0.75,
        shortcut="pad",
    )
    model.double().eval().load_state_dict(models.convert_ride_state_dict(state))
    images = some_images(form)
    torch.testing.assert_close(model(images), logits(form, state, images), rtol=1e-10, atol=1e-10)
