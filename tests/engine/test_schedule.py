import math

import pytest

from shike_fast.engine.schedule import cosine_with_warmup


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
