import torch

from shike_fast.data.shots import shot_accuracy, shot_masks


def test_shots_follow_the_training_counts():
    masks = shot_masks(torch.tensor([500, 101, 100, 20, 19, 1]))
    assert masks["many"].tolist() == [True, True, False, False, False, False]
    assert masks["medium"].tolist() == [False, False, True, True, False, False]
    assert masks["few"].tolist() == [False, False, False, False, True, True]


def test_accuracy_by_shots():
    target, predicted = torch.tensor([0, 0, 1, 1, 2, 2, 2, 2]), torch.tensor([0, 0, 1, 0, 2, 1, 1, 1])
    accuracy = {"top1": 50.0, "many": 100.0, "medium": 50.0, "few": 25.0}
    assert shot_accuracy(predicted, target, [500, 50, 5]) == accuracy
    assert shot_accuracy(predicted, target, torch.tensor([500, 50, 5])) == accuracy
    nothing = torch.zeros(0, dtype=torch.int64)
    assert shot_accuracy(nothing, nothing, [500, 5]) == dict.fromkeys(accuracy)
    assert shot_accuracy(target, target, [500, 500, 500, 5]) == {
        "top1": 100.0,
        "many": 100.0,
        "medium": None,
        "few": None,
    }
