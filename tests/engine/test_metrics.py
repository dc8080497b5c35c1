import pytest
import torch
from torch import nn

from shike_fast.engine.metrics import Evaluation, EvaluationInterrupted, evaluate
from shike_fast.errors import RunError


class Scripted(nn.Module):
    """Returns the logits it is given as images: images [B, K, C] -> [K, B, C]."""

    def forward(self, images, stage):
        return images.transpose(0, 1) * (1 if stage == 1 else -1)


def batches(logits, labels, size=2):
    return [(logits[i : i + size], labels[i : i + size]) for i in range(0, len(labels), size)]


CPU = torch.device("cpu")


def test_accuracy_is_that_of_the_mean_logits():
    counts = torch.tensor([200, 50, 5])
    labels = torch.tensor([0, 0, 1, 2, 2])
    # the experts disagree on the second image: the mean (1.5, 2, 0) says class 1
    logits = torch.tensor(
        [
            [[9.0, 0, 0], [9, 0, 0]],
            [[3.0, 0, 0], [0, 4, 0]],
            [[0.0, 9, 0], [0, 9, 0]],
            [[0.0, 0, 9], [0, 9, 0]],  # a tie in the mean goes to the lower class
            [[0.0, 0, 9], [0, 0, 9]],
        ]
    )
    result = evaluate(Scripted(), batches(logits, labels), stage=1, class_counts=counts, device=CPU)
    assert result.correct.tolist() == [1, 1, 1]
    assert result.support.tolist() == [2, 1, 2]
    assert result.top1 == pytest.approx(60)
    assert result.class_accuracy == pytest.approx([50, 100, 50])
    assert result.shots() == pytest.approx({"many": 50, "medium": 100, "few": 50})
    assert result.expert_top1 == pytest.approx([100, 60])


def test_stage_reaches_the_model():
    logits = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]]])
    labels = torch.tensor([0, 0])
    counts = torch.tensor([5, 5])
    first = evaluate(Scripted(), batches(logits, labels), stage=1, class_counts=counts, device=CPU)
    second = evaluate(Scripted(), batches(logits, labels), stage=2, class_counts=counts, device=CPU)
    assert (first.top1, second.top1) == (100, 0)


def test_a_shot_or_class_without_images_has_no_accuracy():
    logits = torch.tensor([[[1.0, 0.0]]])
    result = evaluate(
        Scripted(), batches(logits, torch.tensor([0])), stage=1, class_counts=torch.tensor([500, 300]), device=CPU
    )
    assert result.shots() == {"many": 100.0, "medium": None, "few": None}
    assert result.class_accuracy == [100.0, None]


def test_an_observer_sees_every_batch():
    labels = torch.tensor([0, 1, 1])
    logits = torch.randn(3, 4, 2)
    seen = []
    evaluate(
        Scripted(),
        batches(logits, labels),
        stage=1,
        class_counts=torch.tensor([5, 5]),
        device=CPU,
        observe=lambda *batch: seen.append(batch),
    )
    assert torch.equal(torch.cat([batch[0] for batch in seen]), labels)
    assert torch.equal(torch.cat([batch[1] for batch in seen], 1), logits.transpose(0, 1))
    assert torch.equal(torch.cat([batch[2] for batch in seen]), logits.mean(1))


def test_what_a_checkpoint_of_an_earlier_version_holds():
    counts = torch.tensor([1, 2])
    stored = {"correct": counts, "support": counts, "class_counts": counts, "expert_correct": counts}
    assert Evaluation.stored(stored | {"calibration_error": None}).top1 == 100


def test_training_mode_is_restored():
    model = Scripted().train()
    seen = []
    model.register_forward_pre_hook(lambda module, arguments: seen.append(module.training))
    one = batches(torch.zeros(2, 1, 2), torch.tensor([0, 1]))
    evaluate(model, one, stage=1, class_counts=torch.tensor([1, 1]), device=CPU)
    assert seen == [False]
    assert model.training


def test_stop_request():
    model = Scripted().train()
    one = batches(torch.zeros(2, 1, 2), torch.tensor([0, 1]))
    with pytest.raises(EvaluationInterrupted):
        evaluate(model, one, stage=1, class_counts=torch.tensor([1, 1]), device=CPU, should_stop=lambda: True)
    assert model.training


def test_logits_that_are_not_finite():
    logits = torch.tensor([[[1.0, float("nan")]]])
    with pytest.raises(RunError, match="logits on the test images are not finite"):
        evaluate(Scripted(), batches(logits, torch.tensor([0])), stage=1, class_counts=torch.tensor([1, 1]), device=CPU)


def test_no_batches():
    with pytest.raises(ValueError, match="at least one batch"):
        evaluate(Scripted(), [], stage=1, class_counts=torch.tensor([1, 1]), device=CPU)
