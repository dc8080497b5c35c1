import torch

from shike_fast.data.shots import shot_masks


def test_shots_follow_the_training_counts():
    masks = shot_masks(torch.tensor([500, 101, 100, 20, 19, 1]))
    assert masks["many"].tolist() == [True, True, False, False, False, False]
    assert masks["medium"].tolist() == [False, False, True, True, False, False]
    assert masks["few"].tolist() == [False, False, False, False, True, True]
