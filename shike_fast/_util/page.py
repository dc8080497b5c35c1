"""What the HTML pages share: one file with style, tables and pictures in it, which links to nothing."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from shike_fast._version import __version__

REPORT = "report"  # kinds of pages
DESCRIPTION = "description"

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
img{{display:block;max-width:100%;height:auto;margin:0 auto;border-radius:6px}}
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


def page(kind: str, title: str, told: Iterable[str], tiles: Sequence[tuple[str, str]], sections: Iterable[str]) -> str:
    """A whole document.

    Args:
        kind: what it is, which :func:`is_page_of` asks for.
        title: its heading.
        told: sentences below it, a paragraph each.
        tiles: the figures above all others: what they are, and the figure.
        sections: HTML, each made by :func:`section`.
    """
    figures = "".join(f"<div><b>{text(value)}</b><span>{text(name)}</span></div>" for name, value in tiles)
    return (
        f'<!DOCTYPE html>{_mark(kind)}\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="color-scheme" '
        f'content="light dark"><title>{text(title)}</title><style>{STYLE}</style></head><body>'
        f"<header><h1>{text(title)}</h1>{''.join(f'<p>{text(line)}</p>' for line in told)}</header>"
        f'<div class="tiles">{figures}</div><main>{"".join(sections)}</main>'
        f"<footer><p>shike_fast {__version__}</p></footer></body></html>\n"
    )


def is_page_of(kind: str, path: Path) -> bool:
    """Whether the file at ``path`` is a page of the kind."""
    with open(path, "rb") as file:
        return file.readline().rstrip().endswith(_mark(kind).encode())


def _mark(kind: str) -> str:
    return f"<!-- {kind} of shike_fast -->"


def shown(name: str) -> str:
    """A class name that UTF-8 can hold: file names need not."""
    return name.encode("utf-8", "backslashreplace").decode()


def text(content: object) -> str:
    """Anything as text of a page."""
    return html.escape(shown(str(content)))


def section(heading: str, content: str, note: str = "") -> str:
    """A box with a heading, its HTML, and perhaps a note below."""
    below = f"<p>{text(note)}</p>" if note else ""
    return f"<section><h2>{text(heading)}</h2>{content}{below}</section>"


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], kind: str = "") -> str:
    """A table; of the kind ``texts`` its cells are flush left."""
    head = "".join(f'<th scope="col">{text(column)}</th>' for column in columns)
    body = "".join(f"<tr>{''.join(f'<td>{text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
