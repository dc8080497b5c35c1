import math

import pytest

from shike_fast.engine.schedule import cosine_with_warmup, scaled_steps, steps_with_warmup


def test_published_stage_1_rates():
    rates = [cosine_with_warmup(e, 180, base_lr=0.15, warmup_epochs=5, start_lr=0.0) for e in range(180)]
    assert rates[:5] == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.125])
    assert rates[5:] == pytest.approx([0.075 * (1 + math.cos(math.pi * (e - 5) / 175)) for e in range(5, 180)])


def test_published_stage_2_rates():
    rates = [cosine_with_warmup(e, 20, base_lr=0.1, warmup_epochs=5, start_lr=0.025) for e in range(20)]
    assert rates[:5] == pytest.approx([0.0375, 0.05, 0.0625, 0.075, 0.0875])
    assert rates[5:] == pytest.approx([0.05 * (1 + math.cos(math.pi * (e - 5) / 15)) for e in range(5, 20)])


def test_without_warmup_starts_at_the_base_rate():
    assert cosine_with_warmup(0, 4, base_lr=0.2, warmup_epochs=0, start_lr=0.0) == 0.2
    assert cosine_with_warmup(2, 4, base_lr=0.2, warmup_epochs=0, start_lr=0.0) == pytest.approx(0.1)


@pytest.mark.parametrize("epoch", [-1, 4])
def test_epoch_outside_the_stage(epoch):
    with pytest.raises(ValueError, match=rf"epoch must be in \[0, 4\), got {epoch}"):
        cosine_with_warmup(epoch, 4, base_lr=0.1, warmup_epochs=0, start_lr=0.0)


@pytest.mark.parametrize("warmup", [-1, 4])
def test_warmup_must_leave_an_epoch(warmup):
    with pytest.raises(ValueError, match="warmup_epochs must be in"):
        cosine_with_warmup(0, 4, base_lr=0.1, warmup_epochs=warmup, start_lr=0.0)


def test_published_steps():
    """RIDE on CIFAR; BalPoE and LDAM-DRW have the same steps and factor."""
    published = {"base_lr": 0.1, "warmup_epochs": 5, "start_lr": 0.0, "steps": (160, 180), "factor": 0.01}
    rates = [steps_with_warmup(e, 200, **published) for e in range(200)]
    assert rates[:5] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1])
    assert rates[5:160] == [0.1] * 155
    assert rates[160:] == pytest.approx([1e-3] * 20 + [1e-5] * 20)


def test_steps_without_warmup_and_within_it():
    usual = {"base_lr": 0.2, "start_lr": 0.1, "factor": 0.5}
    assert [steps_with_warmup(e, 3, warmup_epochs=0, steps=(2,), **usual) for e in range(3)] == [0.2, 0.2, 0.1]
    assert [steps_with_warmup(e, 4, warmup_epochs=2, steps=(1, 1), **usual) for e in range(4)] == pytest.approx(
        [0.15, 0.05, 0.05, 0.05]
    )
    assert steps_with_warmup(3, 4, warmup_epochs=1, steps=(), **usual) == 0.2


@pytest.mark.parametrize(("epoch", "warmup", "message"), [(4, 0, "epoch must be in"), (0, 4, "warmup_epochs must be")])
def test_steps_outside_the_stage(epoch, warmup, message):
    with pytest.raises(ValueError, match=f"steps_with_warmup: {message}"):
        steps_with_warmup(epoch, 4, base_lr=0.1, warmup_epochs=warmup, start_lr=0.0, steps=(2,), factor=0.1)


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [(200, (160, 180)), (400, (320, 360)), (40, (32, 36)), (10, (8, 9)), (3, (2, 2)), (2, (1, 1)), (1, ()), (0, ())],
)
def test_steps_keep_their_share(epochs, expected):
    assert scaled_steps((160, 180), epochs, of=200) == expected
    assert scaled_steps((160, 180), epochs, of=0) == ()
