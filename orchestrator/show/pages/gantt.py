"""A trace as a Gantt chart: one row per worker, in the order of its stages, one bar per span."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from orchestrator.pipeline.trace import BESIDE, PHASES
from orchestrator.show.pages.plots import colour, svg, ticks

_WIDTH, _ROW, _LEFT, _RIGHT, _BOTTOM = 1120, 26, 190, 12, 40
# More bars than a page shows smoothly; later steps are left out.
_MOST = 6000


def gantt(trace: Mapping[str, Any]) -> str:
    """The chart of a Chrome trace as written by `pipeline.trace`; '' when nothing was traced."""
    spans = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    if not spans:
        return ""
    names = {e["pid"]: e["args"] for e in trace["traceEvents"] if e["name"] == "process_name"}
    rows = {rank: i for i, rank in enumerate(sorted(names, key=lambda r: (names[r]["stage"], names[r]["replica"])))}
    steps = sorted({span["args"]["step"] for span in spans})
    while len(steps) > 1 and len(spans) > _MOST:
        dropped = steps.pop()
        spans = [span for span in spans if span["args"]["step"] != dropped]
    start = min(span["ts"] for span in spans)
    length = max(span["ts"] + span["dur"] for span in spans) - start or 1.0
    height = _ROW * len(rows) + _BOTTOM
    scale = (_WIDTH - _LEFT - _RIGHT) / length
    parts = []
    for ms in ticks(0.0, length / 1e3, 10):
        x = _LEFT + 1e3 * ms * scale
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{height - _BOTTOM + 4}"/>')
        parts.append(f'<text x="{x:.1f}" y="{height - _BOTTOM + 18}" text-anchor="middle">{ms:g}</text>')
    parts.append(f'<text x="{(_LEFT + _WIDTH) / 2:.0f}" y="{height - 6}" text-anchor="middle">ms</text>')
    for rank, row in rows.items():
        label = escape(names[rank]["name"])
        parts.append(f'<text x="{_LEFT - 8}" y="{_ROW * row + 20}" text-anchor="end">{label}</text>')
    for span in spans:
        beside = span["cat"] == BESIDE
        x, y = _LEFT + (span["ts"] - start) * scale, _ROW * rows[span["pid"]] + (22 if beside else 6)
        parts.append(
            f'<rect x="{x:.2f}" y="{y}" width="{max(0.3, span["dur"] * scale):.2f}" height="{3 if beside else 15}" '
            f'fill="{colour(PHASES.index(span["cat"]))}">'
            f"<title>{escape(span['name'])}, step {span['args']['step']}: {span['dur'] / 1e3:.3g} ms</title></rect>"
        )
    return svg(_WIDTH, height, parts, "what each worker does over time")
