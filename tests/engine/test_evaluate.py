import csv
import json

import pytest
import torch

from shike_fast import data
from shike_fast.evaluate import main


def run(*arguments):
    return main([str(argument) for argument in arguments])


@pytest.fixture
def checkpoint(finished, tmp_path):
    """A copy of a finished checkpoint, so that results land in a directory of the test's own."""
    path = tmp_path / "last.pt"
    path.write_bytes((finished / "last.pt").read_bytes())
    return path


def test_agrees_with_the_run(checkpoint, finished, runs, capsys):
    assert run("--checkpoint", checkpoint, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    last = runs.metrics(finished)[-1]
    assert {name: result[name] for name in ("top1", "many", "medium", "few", "stage", "epoch")} == {
        name: last[name] for name in ("top1", "many", "medium", "few", "stage", "epoch")
    }
    assert result["test_images"] == 600
    assert len(result["expert_top1"]) == 3
    assert 0 <= result["expected_calibration_error"] <= 1
    assert (checkpoint.parent / "last.per_class.csv").read_text() == (finished / "per_class.csv").read_text()


def test_prints_a_table(checkpoint, capsys):
    assert run("--checkpoint", checkpoint) == 0
    printed = capsys.readouterr().out
    for text in (
        "top-1",
        "many",
        "medium",
        "few",
        "ensemble",
        "expert 3",
        "worst class: ",
        "accuracy under test priors (%)",
        "backward:50",
        "expected calibration error: 0.",
        "last.per_class.csv",
    ):
        assert text in printed


def test_stage_chooses_the_classifiers(checkpoint, capsys):
    results = []
    for stage in (1, 2):
        assert run("--checkpoint", checkpoint, "--stage", stage, "--json") == 0
        results.append(json.loads(capsys.readouterr().out))
    assert [result["stage"] for result in results] == [1, 2]
    assert results[0]["expert_top1"] != results[1]["expert_top1"]


def test_csv_elsewhere(checkpoint, tmp_path, capsys):
    target = tmp_path / "table.csv"
    assert run("--checkpoint", checkpoint, "--csv", target, "--batch-size", 7, "--workers", 1, "--amp", "bf16") == 0
    with open(target, newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10
    assert sum(int(row["test_images"]) for row in rows) == 600
    assert not (tmp_path / "last.per_class.csv").exists()


def test_json_has_all_figures(checkpoint, capsys):
    assert run("--checkpoint", checkpoint, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    with open(checkpoint.parent / "last.per_class.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    accuracies = [float(row["accuracy"]) for row in rows]
    assert result["class_accuracy"] == pytest.approx(accuracies, abs=1e-4)
    assert result["balanced_accuracy"] == pytest.approx(sum(accuracies) / 10, abs=1e-4)
    assert result["worst_class"]["accuracy"] == pytest.approx(min(accuracies), abs=1e-4)
    assert [expert["top1"] for expert in result["experts"]] == result["expert_top1"]
    assert sum(one["images"] for one in result["reliability"]) == 600
    assert result["scores_prior"] == "uniform"  # stage 2 trains by balanced softmax
    assert len(result["test_priors"]) == 11 and not result["prior_sampling"]
    assert {"macro_f1", "worst_tenth", "negative_log_likelihood"} <= result.keys()
    assert not {"test_prior", "test_time", "confusion", "report"} & result.keys()


def test_the_first_stage_learns_the_training_prior(checkpoint, capsys):
    assert run("--checkpoint", checkpoint, "--stage", 1, "--json") == 0
    assert json.loads(capsys.readouterr().out)["scores_prior"] == "train"


def test_a_known_test_prior(checkpoint, tmp_path, capsys):
    (tmp_path / "prior.txt").write_text("0 " * 9 + "1")
    assert run("--checkpoint", checkpoint, "--test-prior", tmp_path / "prior.txt", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    under = result["test_prior"]
    assert under["prior"] == str(tmp_path / "prior.txt") and under["images"] == 60
    assert under["top1"] == pytest.approx(result["class_accuracy"][9])
    assert under["corrected"] == 100  # the only class that there can be
    assert len(result["test_priors"]) == 12
    assert run("--checkpoint", checkpoint, "--test-prior", "forward:10", "--prior-sampling") == 0
    assert "Under the test prior forward:10: " in capsys.readouterr().out


def test_what_is_no_test_prior(checkpoint, tmp_path, capsys):
    assert run("--checkpoint", checkpoint, "--test-prior", "upward:3") == 2
    assert "error: --test-prior: must be uniform, train, forward:RATIO" in capsys.readouterr().err
    assert not (checkpoint.parent / "last.per_class.csv").exists()


def test_sampling_the_test_prior(checkpoint, capsys):
    assert run("--checkpoint", checkpoint, "--prior-sampling", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["prior_sampling"]
    images = {row["prior"]: row["images"] for row in result["test_priors"]}
    assert images["uniform"] == 600
    assert images["forward:50"] == sum(int(60 * 50 ** (-rank / 9) + 1e-9) for rank in range(10))


def test_test_time_weights(checkpoint, capsys):
    assert run("--checkpoint", checkpoint, "--test-time-weights", "--test-prior", "backward:10", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    learned = result["test_time"]
    assert sum(learned["weights"]) == pytest.approx(1) and len(learned["weights"]) == 3
    assert 1 <= learned["epochs"] <= 5
    assert 0 <= learned["top1"] <= 100 and learned["test_prior"]["prior"] == "backward:10"
    assert run("--checkpoint", checkpoint, "--test-time-weights") == 0
    assert "Test-time weights of the experts 0." in capsys.readouterr().out


def test_test_time_weights_of_one_expert(runs, tmp_path, capsys):
    runs.train("--method", "ce", "--model", "resnet8", "--epochs", 1, "--output-dir", tmp_path / "run")
    capsys.readouterr()
    assert run("--checkpoint", tmp_path / "run" / "last.pt", "--test-time-weights") == 2
    assert "--test-time-weights: weighs the experts of a network, method 'ce' has 1 here" in capsys.readouterr().err
    assert run("--checkpoint", tmp_path / "run" / "last.pt") == 0
    printed = capsys.readouterr().out
    assert "network" in printed and "expert 1" not in printed


def test_confusion_and_report(checkpoint, tmp_path, capsys):
    files = ("--confusion", tmp_path / "confusion.csv", "--report", tmp_path / "report.html")
    assert run("--checkpoint", checkpoint, *files, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    with open(tmp_path / "confusion.csv", newline="") as file:
        rows = list(csv.reader(file))[1:]
    hits = sum(int(row[2 + k]) for k, row in enumerate(rows))
    assert hits == pytest.approx(6 * result["top1"])
    page = (tmp_path / "report.html").read_text()
    assert f"{result['top1']:.2f}" in page and "Training" in page
    assert run("--checkpoint", checkpoint, *files) == 0  # they may be replaced
    printed = capsys.readouterr().out
    assert f"report: {tmp_path / 'report.html'}" in printed


@pytest.mark.parametrize(("option", "what"), [("--confusion", "confusion matrix"), ("--report", "report")])
def test_files_that_are_something_else_stay(checkpoint, tmp_path, capsys, option, what):
    (tmp_path / "thesis").write_text("precious")
    assert run("--checkpoint", checkpoint, option, tmp_path / "thesis") == 2
    assert f"error: {option}: {tmp_path / 'thesis'} exists and is no {what}; name" in capsys.readouterr().err
    assert (tmp_path / "thesis").read_text() == "precious"


def test_ce_has_no_second_stage(runs, tmp_path, capsys):
    runs.train("--method", "ce", "--model", "resnet8", "--epochs", 1, "--output-dir", tmp_path / "run")
    capsys.readouterr()
    assert run("--checkpoint", tmp_path / "run" / "best.pt", "--stage", 2) == 2
    assert "method 'ce', which has no stage 2" in capsys.readouterr().err
    assert run("--checkpoint", tmp_path / "run" / "best.pt", "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["expert_top1"]) == 1


def test_missing_checkpoint(tmp_path, capsys):
    assert run("--checkpoint", tmp_path / "gone.pt") == 2
    assert capsys.readouterr().err == (
        f"error: checkpoint {tmp_path / 'gone.pt'} does not exist; "
        "name an existing file such as RUN/last.pt or RUN/best.pt\n"
    )


def test_checkpoint_is_required(capsys):
    assert run() == 2
    assert "--checkpoint" in capsys.readouterr().err


def test_bad_values(checkpoint, capsys):
    assert run("--checkpoint", checkpoint, "--amp", "fp8") == 2
    assert "--amp: must be one of auto, off, bf16, fp16, got 'fp8'" in capsys.readouterr().err
    assert run("--checkpoint", checkpoint, "--batch-size", 0) == 2
    assert "--batch-size: must be at least 1, got 0" in capsys.readouterr().err
    assert run("--checkpoint", checkpoint, "--data-dir", checkpoint.parent / "gone") == 2
    assert "gone is not a folder" in capsys.readouterr().err


def test_a_csv_in_no_folder(checkpoint, tmp_path, capsys):
    assert run("--checkpoint", checkpoint, "--csv", tmp_path / "gone" / "table.csv") == 2
    assert capsys.readouterr().err.startswith(f"error: --csv: {tmp_path / 'gone'} is not a folder")


def test_a_csv_never_replaces_anything_else(checkpoint, tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text("{}")
    assert run("--checkpoint", checkpoint, "--csv", tmp_path / "metrics.jsonl") == 2
    assert "exists and is no table of classes; name another file" in capsys.readouterr().err
    assert (tmp_path / "metrics.jsonl").read_text() == "{}"
    assert run("--checkpoint", checkpoint, "--csv", tmp_path) == 2
    assert "is a folder; name a file" in capsys.readouterr().err


def test_other_classes(checkpoint, monkeypatch, capsys):
    import dataclasses

    plain = data.load_dataset
    monkeypatch.setattr(
        data, "load_dataset", lambda *a, **o: dataclasses.replace(plain(*a, **o), class_names=tuple("abcdefghij"))
    )
    assert run("--checkpoint", checkpoint) == 2
    assert "knows other classes than the digits-lt at hand; check --data-dir" in capsys.readouterr().err


def test_a_model_this_version_does_not_know(checkpoint, capsys):
    state = torch.load(checkpoint, weights_only=True)
    state["model_description"]["name"] = "resnet9000"
    torch.save(state, checkpoint)
    assert run("--checkpoint", checkpoint) == 2
    assert "describes no model of this version of shike_fast" in capsys.readouterr().err


def test_what_this_machine_cannot_do_is_told(checkpoint, monkeypatch, capsys):
    """A run in bfloat16, evaluated where there is none."""

    def refuse(*_, **__):
        raise RuntimeError("not implemented for 'BFloat16'")

    monkeypatch.setattr(torch, "conv2d", refuse)
    assert run("--checkpoint", checkpoint, "--amp", "bf16") == 2
    assert "error: --amp: cpu does not convolve in torch.bfloat16 (not implemented" in capsys.readouterr().err


def test_lost_weights_are_told_with_their_file(checkpoint, capsys):
    state = torch.load(checkpoint, weights_only=True)
    state["model"]["classifiers.weight"].fill_(float("nan"))
    torch.save(state, checkpoint)
    assert run("--checkpoint", checkpoint, "--stage", 1) == 1
    assert f"error: checkpoint {checkpoint}: the model's logits on the test images are" in capsys.readouterr().err


def test_a_bad_option_is_not_blamed_on_the_checkpoint(checkpoint, capsys):
    assert run("--checkpoint", checkpoint, "--threads", 0) == 2
    assert capsys.readouterr().err == "error: --threads: must be at least 1, got 0\n"
