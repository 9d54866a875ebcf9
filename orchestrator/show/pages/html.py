"""The parts that every page is made of: one file, no scripts, nothing loaded from anywhere."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from html import escape

from orchestrator.show.pages import plots

_STYLE = """
:root{color-scheme:light dark;--line:#8884;--card:#8881;--dim:#778}
*{box-sizing:border-box}h1,h2,h3,p,.numbers b,.key{overflow-wrap:anywhere}
body{font:15px/1.5 system-ui,sans-serif;margin:0 auto;padding:1rem;max-width:1240px}
h1{font-size:1.5rem;margin:.2rem 0}h2{font-size:1.1rem;margin:1.6rem 0 .4rem}
.dim{color:var(--dim)}.grid{display:grid;gap:1rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr))}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:.8rem 1rem;min-width:0}
.card h3{margin:0 0 .4rem;font-size:.95rem}.numbers{display:flex;flex-wrap:wrap;gap:.6rem;margin:.8rem 0}
.numbers div{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:.5rem .9rem;
min-width:0}
.numbers b{display:block;font-size:1.25rem}.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.9rem}
td,th{padding:.2rem .7rem .2rem 0;text-align:right;white-space:nowrap}td:first-child,th:first-child{text-align:left}
svg{width:100%;height:auto;display:block}pre{overflow-x:auto;font-size:.82rem;margin:.4rem 0}
.key{display:flex;flex-wrap:wrap;gap:.2rem .9rem;font-size:.82rem}.key i{display:inline-block;width:.8em;height:.8em;
border-radius:2px;margin-right:.3em}
.sheet{display:grid;gap:.6rem;grid-template-columns:repeat(auto-fill,minmax(96px,1fr))}figure{margin:0;min-width:0}
figure img{width:100%;aspect-ratio:1;object-fit:cover;border-radius:6px;image-rendering:auto;background:var(--line)}
figcaption{font-size:.75rem;line-height:1.3;overflow-wrap:anywhere}code{overflow-wrap:anywhere}body>.card,.grid{margin-top:1rem}
"""


def page(title: str, body: Sequence[str]) -> str:
    """The whole document."""
    stamp = time.strftime("%Y-%m-%d %H:%M:%S")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>"
        + "".join(body)
        + f'<p class="dim">Written {stamp}</p></body></html>\n'
    )


def numbers(shown: Mapping[str, str]) -> str:
    """Large figures with a word above each."""
    cells = "".join(f'<div><span class="dim">{escape(k)}</span><b>{escape(v)}</b></div>' for k, v in shown.items())
    return f'<div class="numbers">{cells}</div>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of plain text."""
    top = "".join(f"<th>{escape(c)}</th>" for c in head)
    lines = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{top}</tr>{lines}</table></div>'


def card(title: str, content: str) -> str:
    """A titled box."""
    return f'<section class="card"><h3>{escape(title)}</h3>{content}</section>'


def sheet(figures: Sequence[tuple[str | None, Sequence[str]]]) -> str:
    """Images (JPEG as base64, or None) with lines of text below each, as many beside one another as there is room."""
    cells = []
    for image, lines in figures:
        alt = escape(", ".join(lines), quote=True)
        drawn = "" if image is None else f'<img loading="lazy" alt="{alt}" src="data:image/jpeg;base64,{image}">'
        cells.append(f"<figure>{drawn}<figcaption>{'<br>'.join(map(escape, lines))}</figcaption></figure>")
    return f'<div class="sheet">{"".join(cells)}</div>'


def plot_card(title: str, drawn: str, names: Sequence[str]) -> str:
    """A plot with its key; a line where there is nothing to draw yet."""
    key = "".join(f'<span><i style="background:{plots.colour(i)}"></i>{escape(n)}</span>' for i, n in enumerate(names))
    content = f'<div class="scroll">{drawn}</div>' + (f'<div class="key">{key}</div>' if key else "")
    return card(title, content if drawn else '<p class="dim">Nothing measured yet.</p>')
