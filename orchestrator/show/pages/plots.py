"""Small SVG plots without a library: lines, bars and a heat map, readable in light and dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

Series = Sequence[tuple[float, float]]
COLOURS = ("#3b6fd4", "#d4663b", "#2f9e6e", "#a24bc0", "#c09a1e", "#c23b66", "#3ba7c2", "#7a7a7a", "#94b447")
_WIDTH, _HEIGHT = 560, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 12, 40
# Letters are of 10 pixels and more; below 8 nobody reads them.
_READABLE = 0.82
# Alone in a wide card it would shout.
_LARGEST = 1.4


def colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that divide [low, high]."""
    if high <= low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 10) for n in range(first, math.floor(high / step + 1e-9) + 1)]


def line_plot(
    series: Mapping[str, Series], *, x_label: str, y_label: str, percent: bool = False, from_zero: bool = False
) -> str:
    """Lines over a common axis; a series of one point is a dot. Returns '' when there is nothing to draw."""
    points = [p for line in series.values() for p in line]
    if not points:
        return ""
    x_low, x_high = min(p[0] for p in points), max(p[0] for p in points)
    y_low, y_high = min(p[1] for p in points), max(p[1] for p in points)
    if x_high == x_low:
        x_low, x_high = x_low - 0.5, x_high + 0.5
    y_low = min(y_low, 0.0) if from_zero else y_low
    pad = (y_high - y_low) * 0.06 or abs(y_high) * 0.1 or 0.5
    y_low, y_high = (y_low - pad if y_low < 0 or y_low > pad else 0.0), y_high + pad

    def px(x: float) -> float:
        return _LEFT + (x - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT)

    def py(y: float) -> float:
        return _HEIGHT - _BOTTOM - (y - y_low) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for y in ticks(y_low, y_high):
        label = f"{100 * y:g} %" if percent else f"{y:g}"
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{py(y):.1f}" y2="{py(y):.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{py(y) + 4:.1f}" text-anchor="end">{label}</text>')
    for x in ticks(x_low, x_high, 8):
        parts.append(f'<text x="{px(x):.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{x:g}</text>')
    parts.append(
        f'<text x="{(_LEFT + _WIDTH) / 2:.0f}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>'
    )
    for i, (name, line) in enumerate(series.items()):
        path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in line)
        title = f"<title>{escape(name)}</title>"
        if len(line) > 1:
            parts.append(
                f'<polyline fill="none" stroke="{colour(i)}" stroke-width="2" points="{path}">{title}</polyline>'
            )
        for x, y in line if len(line) < 40 else line[-1:]:
            parts.append(f'<circle cx="{px(x):.1f}" cy="{py(y):.1f}" r="2.5" fill="{colour(i)}">{title}</circle>')
    return svg(_WIDTH, _HEIGHT, parts, y_label)


def bar_plot(values: Sequence[tuple[str, float]], label: str = "accuracy of each layer") -> str:
    """Horizontal bars of fractions with their percentage."""
    row = 26
    left = max(120, 16 + 6 * max(len(name) for name, _ in values))
    height = row * len(values) + 8
    parts = []
    for i, (name, value) in enumerate(values):
        y = 4 + i * row
        width = max(0.0, value) * (_WIDTH - left - 80)
        parts.append(f'<text x="{left - 8}" y="{y + 17}" text-anchor="end">{escape(name)}</text>')
        parts.append(f'<rect x="{left}" y="{y + 3}" width="{width:.1f}" height="{row - 8}" rx="3" fill="{colour(i)}"/>')
        parts.append(f'<text x="{left + width + 6:.1f}" y="{y + 17}">{100 * value:.2f} %</text>')
    return svg(_WIDTH, height, parts, label)


def heat_map(matrix: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    """A confusion matrix: rows are true classes, shades are fractions of the row."""
    cells = []
    for t, row in enumerate(matrix):
        total = sum(row) or 1
        cells.append(
            [
                ("#2f9e6e" if t == p else "#c23b66", count / total, str(count or ""), f"called {names[p]}: {count}")
                for p, count in enumerate(row)
            ]
        )
    return _map(cells, names, "predicted", "confusion matrix")


def similarity_map(matrix: Sequence[Sequence[float]], names: Sequence[str]) -> str:
    """Cosines between classes: blue above 0, red below."""
    cells = [
        [
            (COLOURS[0] if cosine >= 0 else COLOURS[5], abs(cosine), f"{cosine:.2f}", f"and {names[p]}: {cosine:.2f}")
            for p, cosine in enumerate(row)
        ]
        for row in matrix
    ]
    return _map(cells, names, "", "cosines between prototypes")


def usage_map(matrix: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    """Samples of each class (a row) by the nearest of its prototypes, most used first; shades are shares of the row."""
    cells = []
    for row in matrix:
        total = sum(row) or 1
        ordered = sorted(row, reverse=True)
        cells.append([(COLOURS[2], n / total, str(n), f"prototype {m + 1}: {n}") for m, n in enumerate(ordered)])
    return _map(cells, names, "prototypes, most used first", "usage of prototypes")


# Colour, shade in [0, 1], text and what a pointer is told.
_Cell = tuple[str, float, str, str]


def _map(cells: Sequence[Sequence[_Cell]], names: Sequence[str], across: str, label: str) -> str:
    """A table of shaded cells, a row for each name; the texts are there while they fit."""
    n, columns = len(cells), len(cells[0])
    cell = max(6.0, min(38.0, 470.0 / max(n, columns)))
    left, top = (90.0, 24.0) if n <= 30 else (20.0, 20.0)
    width, height = columns * cell, n * cell
    parts = [f'<text x="{left + width / 2:.0f}" y="12" text-anchor="middle">{escape(across)}</text>']
    for t, row in enumerate(cells):
        for p, (shade, share, text, told) in enumerate(row):
            x, y = left + p * cell, top + t * cell
            parts.append(
                f'<rect class="cell" x="{x:.1f}" y="{y:.1f}" width="{cell:.1f}" height="{cell:.1f}" '
                f'fill="{shade}" fill-opacity="{0 if not share else 0.08 + 0.92 * share:.3f}">'
                f"<title>{escape(names[t])} {escape(told)}</title></rect>"
            )
            if max(n, columns) <= 12:
                light = ' style="fill:#fff"' if share > 0.5 else ""
                parts.append(
                    f'<text x="{x + cell / 2:.1f}" y="{y + cell / 2 + 4:.1f}" text-anchor="middle" '
                    f'font-size="10"{light}>{text}</text>'
                )
        if n <= 30:
            parts.append(
                f'<text x="{left - 6:.0f}" y="{top + t * cell + cell / 2 + 4:.1f}" text-anchor="end">'
                f"{escape(names[t][:14])}</text>"
            )
    return svg(left + width + 8, top + height + 8, parts, label)


def svg(width: float, height: float, parts: Sequence[str], label: str) -> str:
    """A standalone picture of these elements."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
        f'aria-label="{escape(label)}" font-family="system-ui, sans-serif" font-size="11" '
        # Where there is less room, on a phone, it is moved sideways, so that its letters can be read.
        f'style="min-width:{_READABLE * width:.0f}px;max-width:{_LARGEST * width:.0f}px">'
        + "<style>text{fill:#667}.grid{stroke:#8884;stroke-width:1}.cell{stroke:#8883;stroke-width:.5}</style>"
        + "".join(parts)
        + "</svg>"
    )


def layer_curves(events: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Series]:
    """Validation accuracy of each layer over epochs, from the lines of events.jsonl."""
    curves: dict[str, list[tuple[float, float]]] = {f"{i} {name}": [] for i, name in enumerate(names)}
    epoch = 0.0
    for event in events:
        epoch = float(event.get("epoch", epoch)) if event["event"] == "epoch" else epoch
        if event["event"] in ("epoch", "final"):
            for line, value in zip(curves.values(), event["layer_val_top1"] or [], strict=False):
                line.append((epoch, value))
    return {name: line for name, line in curves.items() if line}


def accuracy_plot(events: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """The per-layer accuracy over epochs as a standalone SVG file."""
    drawn = line_plot(layer_curves(events, names), x_label="epoch", y_label="val top-1", percent=True)
    return drawn or svg(_WIDTH, 40, ['<text x="8" y="24">no validation data</text>'], "no data")
