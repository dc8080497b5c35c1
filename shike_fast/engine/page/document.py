"""The report of a test as one HTML file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from shike_fast._util.page import REPORT, page, section, table, text
from shike_fast.data.shots import SHOTS, shot_names
from shike_fast.engine.page import charts
from shike_fast.engine.priors import SQUARE_ROOT, TRAIN
from shike_fast.engine.tail import TailEvaluation

_WORST = 10  # classes in their table


def document(
    title: str,
    tail: TailEvaluation,
    class_names: Sequence[str],
    *,
    what: str,
    settings: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]] = (),
    best: Mapping[str, Any] | None = None,
    sampled: bool = False,
    notes: Iterable[str] = (),
) -> str:
    """The whole report.

    Args:
        title: its heading.
        tail: what was tested.
        class_names: one a class.
        what: which model it was: stage, epoch, file.
        settings: those of the run.
        history: metrics of its epochs; without any there are no curves.
        best: metrics of its best epoch.
        sampled: the rows of test priors are of sampled images (:meth:`TailEvaluation.under`).
        notes: further results, a sentence each.
    """
    under = [tail.under(prior, sampled=sampled) for prior in tail.priors]
    bins = tail.reliability()
    sections = [
        section("Accuracy (%)", _experts(tail)),
        section("Classes", charts.class_chart(tail, class_names)),
        section("Test priors", charts.prior_chart(under) + _priors(tail, under, sampled)) if under else "",
        section("Confusion", charts.confusion_chart(tail, class_names), _confusion_note(class_names)),
        section("Calibration", charts.reliability_chart(bins)),
        section("Worst classes", _worst(tail, class_names)),
        section("Training", charts.curves([dict(row) for row in history])) if history else "",
        section("Settings", _settings(settings)),
    ]
    told = [what, *notes]
    if best is not None:
        told.append(f"Best epoch, chosen on the test set: {best['epoch']} with top-1 {best['top1']:.2f} %.")
    return page(REPORT, title, told, _tiles(tail, class_names), sections)


def _figure(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _tiles(tail: TailEvaluation, names: Sequence[str]) -> list[tuple[str, str]]:
    figures = tail.ensemble.figures()
    worst = tail.ensemble.worst_class
    return [
        ("top-1 (%)", _figure(figures["top1"])),
        *((f"{shot}-shot (%)", _figure(figures[shot])) for shot in SHOTS),
        ("balanced accuracy (%)", _figure(figures["balanced_accuracy"])),
        ("macro-F1 (%)", _figure(figures["macro_f1"])),
        (f"worst class, {names[worst]} (%)", _figure(tail.evaluation.class_accuracy[worst])),
        ("worst tenth of the classes (%)", _figure(figures["worst_tenth"])),
        ("calibration error (ECE)", _figure(tail.calibration_error, 4)),
        ("negative log-likelihood", _figure(tail.negative_log_likelihood, 4)),
        ("test images", f"{len(tail.labels):,}"),
        ("classes", f"{len(names):,}"),
    ]


def _experts(tail: TailEvaluation) -> str:
    columns = ("", "top-1", *SHOTS, "balanced", "macro-F1", "worst class", "worst tenth")
    several = [(f"expert {k + 1}", expert) for k, expert in enumerate(tail.experts)] if len(tail.experts) > 1 else []
    rows = []
    for name, one in (("ensemble" if several else "network", tail.ensemble), *several):
        figures = one.figures()
        measures = ("top1", *SHOTS, "balanced_accuracy", "macro_f1")
        worst = one.evaluation.class_accuracy[one.worst_class]
        cells = [*(figures[measure] for measure in measures), worst, figures["worst_tenth"]]
        rows.append([name, *map(_figure, cells)])
    return table(columns, rows)


def _priors(tail: TailEvaluation, under: Sequence[Any], sampled: bool) -> str:
    experts = range(len(under[0].expert_top1)) if len(under[0].expert_top1) > 1 else ()
    columns = ("test prior", "uncorrected", "corrected", *(f"expert {k + 1}" for k in experts))
    rows = [
        [row.prior, *map(_figure, (row.top1, row.corrected, *(row.expert_top1[k] for k in experts)))] for row in under
    ]
    how = "accuracy over the images that the protocol keeps" if sampled else "class accuracies weighted by the prior"
    learned = {TRAIN: "training prior", SQUARE_ROOT: "square root of the training prior"}.get(tail.scores_prior)
    taken = "" if learned is None else f"less the log {learned}, "
    note = f"{how}; corrected: scores {taken}plus the log test prior."
    return f"{table(columns, rows)}<p>{text(note[0].upper() + note[1:])}</p>"


def _confusion_note(names: Sequence[str]) -> str:
    return (
        "Shares of a row in percent." if len(names) <= 20 else "Shares of a row: the darker, the larger (square root)."
    )


def _worst(tail: TailEvaluation, names: Sequence[str]) -> str:
    evaluation = tail.evaluation
    accuracies, shots = evaluation.class_accuracy, shot_names(evaluation.class_counts)
    known = [label for label, accuracy in enumerate(accuracies) if accuracy is not None]
    worst = sorted(known, key=lambda label: (accuracies[label], -int(evaluation.support[label]), label))[:_WORST]
    rows = []
    for label, row in zip(worst, tail.confusion(worst), strict=True):
        row = row.clone()
        row[label] = 0
        other = int(row.argmax())
        mistake = f"{names[other]} ({int(row[other])})" if row[other] else "–"
        images = f"{int(evaluation.class_counts[label]):,}", f"{int(evaluation.support[label]):,}"
        rows.append([names[label], _figure(accuracies[label]), shots[label], *images, mistake])
    never = sum(accuracies[label] == 0 for label in known)
    note = f"<p>Never right: {never:,} of {len(known):,} classes.</p>"
    return table(("class", "accuracy (%)", "shot", "training", "test", "most often taken for"), rows) + note


def _settings(settings: Mapping[str, Any]) -> str:
    return table(("setting", "value"), ((name, _value(value)) for name, value in settings.items()), "texts")


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "–"
    return "–" if value is None else str(value)
