"""Weights of the experts that unlabelled test images teach: the recorded case, and through a run."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from shike_fast.engine.inference import load_trained
from shike_fast.engine.priors import long_tail_prior
from shike_fast.engine.state import load_data
from shike_fast.engine.test_time import MOST_EPOCHS, ExpertWeights, learn_expert_weights
from shike_fast.errors import ConfigError

SETTINGS = dict.fromkeys(("data_dir", "workers", "device", "threads", "amp"))


def recorded(golden):
    arrays = {key: value for key, value in golden("methods").items() if key.startswith("sade_tta/")}
    names = sorted({key.rsplit("/", 1)[0] for key in arrays})
    return {name: {key.rsplit("/", 1)[1]: arrays[key] for key in arrays if key.startswith(name)} for name in names}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_it_steps_as_the_published_code(golden, dtype, tolerance):
    cases = recorded(golden)
    assert cases
    for case in cases.values():
        settings = json.loads(str(case["json"]))
        options = {name: settings[name] for name in ("lr", "momentum", "nesterov", "weight_decay")}
        learned = ExpertWeights(settings["K"], dtype=dtype, **options)
        assert learned.free.tolist() == pytest.approx([settings["start"]] * settings["K"], rel=1e-6)
        views = [torch.from_numpy(case[f"logits_view{j}"]).to(dtype) for j in (0, 1)]
        for step, (first, second) in enumerate(zip(*views, strict=True)):
            loss = learned.step(first, second)
            # before the optimizer adds the weight decay
            assert learned.free.grad.numpy() == pytest.approx(
                case["weight_grads"][step], rel=1e2 * tolerance, abs=tolerance
            )
            assert learned.free.detach().numpy() == pytest.approx(case["weights"][step], rel=tolerance)
        assert float(loss) == pytest.approx(float(case["loss"]), rel=tolerance)
        assert learned.weights.numpy() == pytest.approx(case["final_softmax"], rel=tolerance)


def test_scores_are_the_weighted_mixture():
    learned = ExpertWeights(2, lr=0.1, dtype=torch.float64)
    with torch.no_grad():
        learned.free.copy_(torch.tensor([0.0, np.log(3.0)]))
    logits = torch.randn(2, 4, 5, dtype=torch.float64)
    expected = 0.25 * logits[0].numpy() + 0.75 * logits[1].numpy()
    assert learned.scores(logits).detach().numpy() == pytest.approx(expected)


def steady(images=64):
    """Views that agree in the first expert and not at all in the second."""
    common = 5 * torch.randn(images, 10)
    return [torch.stack([common, 5 * torch.randn(images, 10)]) for _ in range(2)]


def test_it_prefers_the_expert_whose_views_agree():
    learned = ExpertWeights(2, lr=0.1)
    learned.learn([[steady()] * 10])
    assert learned.weights[0] > 0.6 and learned.epochs == 1


def test_it_ends_after_an_epoch_in_which_a_weight_has_become_small():
    learned = ExpertWeights(2, lr=5.0)
    learned.learn([steady()] * 20 for _ in range(50))
    assert learned.epochs < 50
    assert round(float(learned.weights[1]), 2) < 0.05


def test_a_weight_that_rounds_to_the_least_is_kept():
    learned = ExpertWeights(2, lr=0.0)
    with torch.no_grad():
        learned.free.copy_(torch.tensor([0.0, np.log(0.046 / 0.954)]))  # rounds to 0.05
    learned.learn([[steady()]] * 3)
    assert learned.epochs == 3
    with torch.no_grad():
        learned.free.copy_(torch.tensor([0.0, np.log(0.044 / 0.956)]))
    learned.learn([[steady()]] * 3)
    assert learned.epochs == 4


def test_one_expert_has_nothing_to_weigh():
    with pytest.raises(ValueError, match="num_experts must be at least 2, got 1"):
        ExpertWeights(1, lr=0.1)


@pytest.fixture
def trained(finished):
    return load_trained(finished / "last.pt", None, SETTINGS)


def test_a_trained_network(trained):
    dataset = load_data(trained.config)
    before = {name: value.clone() for name, value in trained.network.state_dict().items()}
    learned = learn_expert_weights(trained, dataset)
    assert learned.epochs == MOST_EPOCHS
    assert float(learned.weights.sum()) == pytest.approx(1)
    assert len(set(learned.weights.tolist())) == 3  # it has moved
    assert all(torch.equal(value, before[name]) for name, value in trained.network.state_dict().items())
    assert all(parameter.grad is None for parameter in trained.network.parameters())
    again = learn_expert_weights(trained, dataset)
    assert torch.equal(again.free, learned.free)


def test_labels_are_not_read(trained):
    dataset = load_data(trained.config)
    learned = learn_expert_weights(trained, dataset)
    dataset.test.labels[:] = 0
    assert torch.equal(learn_expert_weights(trained, dataset).free, learned.free)


def test_under_a_prior_it_learns_on_a_sample(trained, monkeypatch):
    dataset = load_data(trained.config)
    monkeypatch.setattr(ExpertWeights, "learn", lambda self, epochs: list(next(epochs)))  # one epoch is enough
    plain = trained.network.forward
    images = []
    monkeypatch.setattr(
        trained.network, "forward", lambda batch, **options: images.append(len(batch)) or plain(batch, **options)
    )
    learn_expert_weights(trained, dataset, long_tail_prior(dataset.class_counts, 50))
    kept = sum(int(60 * 50 ** (-rank / 9) + 1e-9) for rank in range(10))
    assert sum(images) == 2 * kept  # both views


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"num_experts": 1}, "--test-time-weights: weighs the experts of a network, method 'shike' has 1 here"),
        ({"augmentation": "none"}, "--test-time-weights: needs two different views of an image"),
    ],
)
def test_runs_that_cannot(trained, setting, message):
    with pytest.raises(ConfigError, match=message):
        learn_expert_weights(
            dataclasses.replace(trained, config=dataclasses.replace(trained.config, **setting)),
            load_data(trained.config),
        )


def test_images_that_cannot_be_augmented(trained):
    class Plain:
        labels = np.zeros(3, np.int64)

        def __len__(self):
            return 3

    dataset = dataclasses.replace(load_data(trained.config), test=Plain())
    with pytest.raises(ConfigError, match="those of digits-lt cannot be augmented"):
        learn_expert_weights(trained, dataset)
