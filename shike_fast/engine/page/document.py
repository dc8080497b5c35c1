"""The report as one HTML file: style, tables and pictures are in it, and it links to nothing."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from shike_fast._version import __version__
from shike_fast.data.shots import SHOTS, shot_names
from shike_fast.engine.page import charts
from shike_fast.engine.priors import SQUARE_ROOT, TRAIN
from shike_fast.engine.tail import TailEvaluation

_WORST = 10  # classes in their table
_MARK = "<!-- report of shike_fast -->"
_DEPTHS = "".join(f".depth{d}{{fill-opacity:{max(4, round(100 * (d / 9) ** 1.2))}%}}" for d in range(10))

STYLE = f"""
:root{{--ink:#1b1f24;--muted:#606a76;--grid:#dde2e8;--paper:#fff;--box:#f4f6f8;--many:#1f6fb4;--medium:#c77700;
--few:#c62f2d;--count:#aeb8c2;--e0:#7a4fb5;--e1:#2a8a57;--e2:#a8578a;--e3:#4c7f8f}}
@media (prefers-color-scheme:dark){{:root{{--ink:#e8eaed;--muted:#a3adb8;--grid:#363d45;--paper:#16191d;--box:#20252b;
--many:#62a8e5;--medium:#efaa4a;--few:#f0736f;--count:#56616c;--e0:#b391e6;--e1:#63c592;--e2:#dd92c1;--e3:#86b9c8}}
image{{filter:brightness(1.6)}}}}
body{{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:1340px;margin:0 auto;
padding:24px}}
h1{{font-size:24px;margin:0}}h2{{font-size:17px;margin:0 0 8px}}p{{margin:4px 0;color:var(--muted)}}
.tiles{{display:grid;grid-template-columns:repeat(auto-fit,minmax(118px,1fr));gap:10px;margin:18px 0}}
.tiles div{{background:var(--box);border-radius:8px;padding:9px 12px;overflow-wrap:anywhere}}
.tiles b{{display:block;font-size:20px}}.tiles span{{color:var(--muted);font-size:13px}}
main{{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,560px),1fr));gap:18px;align-items:start}}
section{{background:var(--box);border-radius:8px;padding:14px 16px;min-width:0;overflow-x:auto}}
table{{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}}
th,td{{text-align:right;padding:3px 8px;border-bottom:1px solid var(--grid);font-weight:400}}
thead th{{color:var(--muted)}}th:first-child,td:first-child{{text-align:left;overflow-wrap:anywhere}}
.texts td{{text-align:left;overflow-wrap:anywhere}}
svg{{display:block;width:100%;height:auto;max-width:760px;margin:0 auto}}
svg text{{font:12px system-ui,sans-serif;fill:var(--ink)}}.middle{{text-anchor:middle}}.end{{text-anchor:end}}
image{{image-rendering:pixelated}}svg text.light{{fill:var(--paper)}}svg text.second{{fill:var(--muted)}}
.grid{{stroke:var(--grid)}}.axis{{stroke:var(--muted);fill:none}}
.line{{fill:none;stroke-width:2;stroke-linejoin:round}}.dot{{fill:none;stroke-width:7;stroke-linecap:round}}
.key{{stroke-width:5}}.area{{opacity:.35}}
.many{{stroke:var(--many)}}.medium{{stroke:var(--medium)}}.few{{stroke:var(--few)}}.mean{{stroke:var(--ink)}}
.count{{stroke:var(--count)}}.area.count,.bar.count{{fill:var(--count)}}
.ideal{{stroke:var(--ink);stroke-dasharray:5 4}}
.edge{{stroke:var(--few);stroke-width:1;stroke-dasharray:4 3}}
.expert0{{stroke:var(--e0)}}.expert1{{stroke:var(--e1)}}.expert2{{stroke:var(--e2)}}.expert3{{stroke:var(--e3)}}
.bar.many{{fill:var(--many)}}.bar.medium{{fill:var(--medium)}}.bar.few{{fill:var(--few)}}.bar{{stroke:none}}
.bar.cell{{fill:var(--many)}}{_DEPTHS}
"""


def is_report(first_line: bytes) -> bool:
    """Whether a file that begins so is a report."""
    return first_line.rstrip().endswith(_MARK.encode())


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
        _section("Accuracy (%)", _experts(tail)),
        _section("Classes", charts.class_chart(tail, class_names)),
        _section("Test priors", charts.prior_chart(under) + _priors(tail, under, sampled)) if under else "",
        _section("Confusion", charts.confusion_chart(tail, class_names), _confusion_note(class_names)),
        _section("Calibration", charts.reliability_chart(bins)),
        _section("Worst classes", _worst(tail, class_names)),
        _section("Training", charts.curves([dict(row) for row in history])) if history else "",
        _section("Settings", _settings(settings)),
    ]
    told = [what, *notes]
    if best is not None:
        told.append(f"Best epoch, chosen on the test set: {best['epoch']} with top-1 {best['top1']:.2f} %.")
    return (
        f'<!DOCTYPE html>{_MARK}\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="color-scheme" '
        f'content="light dark"><title>{_text(title)}</title><style>{STYLE}</style></head><body>'
        f"<header><h1>{_text(title)}</h1>{''.join(f'<p>{_text(line)}</p>' for line in told)}</header>"
        f"{_tiles(tail, class_names)}<main>{''.join(sections)}</main>"
        f"<footer><p>shike_fast {__version__}</p></footer></body></html>\n"
    )


def _text(text: object) -> str:
    return html.escape(charts.shown(str(text)))


def _section(heading: str, content: str, note: str = "") -> str:
    below = f"<p>{_text(note)}</p>" if note else ""
    return f"<section><h2>{_text(heading)}</h2>{content}{below}</section>"


def _figure(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _table(columns: Sequence[str], rows: Iterable[Sequence[object]], kind: str = "") -> str:
    head = "".join(f'<th scope="col">{_text(column)}</th>' for column in columns)
    body = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _tiles(tail: TailEvaluation, names: Sequence[str]) -> str:
    figures = tail.ensemble.figures()
    worst = tail.ensemble.worst_class
    tiles = [
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
    return (
        f'<div class="tiles">{"".join(f"<div><b>{_text(v)}</b><span>{_text(k)}</span></div>" for k, v in tiles)}</div>'
    )


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
    return _table(columns, rows)


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
    return f"{_table(columns, rows)}<p>{_text(note[0].upper() + note[1:])}</p>"


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
    return _table(("class", "accuracy (%)", "shot", "training", "test", "most often taken for"), rows) + note


def _settings(settings: Mapping[str, Any]) -> str:
    return _table(("setting", "value"), ((name, _value(value)) for name, value in settings.items()), "texts")


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "–"
    return "–" if value is None else str(value)
