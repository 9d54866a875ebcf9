"""The page of a search: the best trial, parallel coordinates, importance of each value, all trials."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from orchestrator.job.load import load_any
from orchestrator.job.search import SearchJob
from orchestrator.job.space import FINITE, Space, kind_of
from orchestrator.run.folder import RunFolder, read_json
from orchestrator.search import record
from orchestrator.search.importance import importance, position
from orchestrator.search.record import Trial
from orchestrator.show.pages import html, plots
from orchestrator.show.search_terminal import in_order, metric_text, value_text, values_text
from orchestrator.show.terminal import duration


def is_search(path: Path) -> bool:
    """Whether a folder is that of a search."""
    return (path / "search.json").is_file()


def sections(path: Path) -> list[str]:
    """The body of the page of a finished, stopped or running search."""
    folder = RunFolder(path)
    search = load_any(folder.job)
    assert isinstance(search, SearchJob)
    saved = read_json(path / "search.json")
    trials = record.from_json(saved["trials"])
    summary: dict[str, Any] = read_json(folder.summary) or {}
    parts = [_numbers(search, trials, saved["seconds"], bool(summary)), '<div class="grid">']
    for layer in sorted({t.layer for t in trials}, key=lambda x: -1 if x is None else x):
        group = [t for t in trials if t.layer == layer]
        of = "" if layer is None else f" of layer {layer}"
        drawn = parallel_coordinates(search.domains, group, metric=search.metric, sign=search.sign)
        parts.append(
            html.plot_card(f"Values and {search.metric}{of}, one line per trial", drawn, ["finished", "stopped"])
        )
        shares = [(path.rpartition(".")[2], share) for path, share in importance(search.domains, group).items()]
        shares.sort(key=lambda entry: -entry[1])
        title = f"Share of each value in the spread of {search.metric}{of} (random forest)"
        parts.append(html.plot_card(title, plots.bar_plot(shares, label=title) if shares else "", []))
        curves = {f"{t.index}": [(float(e), v) for e, v in t.curve] for t in group if t.curve}
        percent = search.metric.startswith("val_")
        drawn = plots.line_plot(curves, x_label="epoch", y_label=search.metric, percent=percent)
        parts.append(html.plot_card(f"{search.metric} over epochs{of}", drawn, [f"trial {name}" for name in curves]))
    parts += ["</div>", html.card("Trials", _table(search, trials))]
    best = path / "best.yaml"
    if best.exists():
        parts.append(html.card("Best job", f"<pre>{escape(best.read_text(encoding='utf-8'))}</pre>"))
    parts.append(html.card("Search", f"<pre>{escape(folder.job.read_text(encoding='utf-8'))}</pre>"))
    if summary:
        facts = {key: summary[key] for key in ("run_id", "seed", "git_commit", "counts")}
        parts.append(html.card("What it is made of", f"<pre>{escape(json.dumps(facts, indent=1))}</pre>"))
    return parts


def _numbers(search: SearchJob, trials: Sequence[Trial], seconds: float, done: bool) -> str:
    layers = [t.layer for t in trials if t.layer is not None]
    best = record.best([t for t in trials if not layers or t.layer == max(layers)], search.sign)
    counts = record.counts(trials)
    return html.numbers(
        {
            "status": "finished" if done else f"{sum(t.ended for t in trials)} trials ended",
            f"best {search.metric}": "-" if best is None else metric_text(search.metric, best.metric),
            "best trial": "-" if best is None else str(best.index),
            "trials": ", ".join(f"{n} {status}" for status, n in counts.items() if n) or "-",
            "training time, all trials": duration(record.total_seconds(trials)),
            "wall time": duration(seconds),
            "strategy": f"{search.strategy}, {search.sampler}, {search.scheduler.name}",
        }
    )


def _table(search: SearchJob, trials: Sequence[Trial]) -> str:
    rows = []
    for t in in_order(record.to_json(trials), search.mode):
        rows.append(
            (
                str(t["index"]),
                *(() if t["layer"] is None else (str(t["layer"]),)),
                t["status"],
                metric_text(search.metric, t["metric"]),
                str(t["curve"][-1][0]) if t["curve"] else "-",
                "-" if t["seconds"] is None else duration(t["seconds"]),
                *(value_text(t["values"][path]) for path in search.space),
                (t["message"] or "").split("\n")[0],
            )
        )
    layer = ("layer",) if trials and trials[0].layer is not None else ()
    head = ("trial", *layer, "status", search.metric, "epochs", "training", *search.space, "message")
    return html.table(head, rows)


_WIDTH, _HEIGHT, _TOP, _BOTTOM, _SIDE = 640, 300, 34, 18, 60


def parallel_coordinates(space: Space, trials: Sequence[Trial], *, metric: str, sign: int) -> str:
    """One line per trial over an axis per path and one for the metric; better trials are darker, stopped ones dashed.

    Returns '' without a measured trial.
    """
    measured = [t for t in trials if t.metric is not None]
    if not measured:
        return ""
    values = [t.metric for t in measured if t.metric is not None]
    low, high = min(values), max(values)
    names = [*(path.rpartition(".")[2] for path in space), metric]
    xs = [_SIDE + i * (_WIDTH - 2 * _SIDE) / max(1, len(names) - 1) for i in range(len(names))]
    parts = [_axis(x, name) for x, name in zip(xs, names, strict=True)]
    for x, domain in zip(xs, space.values(), strict=False):
        parts += _marks(x, domain)
    parts += [_mark(xs[-1], 0.0, metric_text(metric, low)), _mark(xs[-1], 1.0, metric_text(metric, high))]
    for trial in sorted(measured, key=lambda t: sign * (t.metric or 0.0)):
        share = ((trial.metric or 0.0) - low) / (high - low) if high > low else 0.5
        places = [*(position(domain, trial.values[path]) for path, domain in space.items()), share]
        points = " ".join(f"{x:.1f},{_y(place):.1f}" for x, place in zip(xs, places, strict=True))
        good = share if sign > 0 else 1 - share
        stopped = trial.status != "finished"
        dashes = ' stroke-dasharray="4 3"' if stopped else ""
        title = f"trial {trial.index}, {trial.status}: {metric_text(metric, trial.metric)}; {values_text(trial.values)}"
        parts.append(
            f'<polyline fill="none" stroke="{plots.colour(1 if stopped else 0)}" stroke-width="{1 + 2 * good:.2f}" '
            f'stroke-opacity="{0.25 + 0.75 * good:.2f}"{dashes} '
            f'points="{points}"><title>{escape(title)}</title></polyline>'
        )
    return plots.svg(_WIDTH, _HEIGHT, parts, f"values and {metric} of every trial")


def _y(place: float) -> float:
    return _HEIGHT - _BOTTOM - place * (_HEIGHT - _TOP - _BOTTOM)


def _axis(x: float, name: str) -> str:
    return (
        f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>'
        f'<text x="{x:.1f}" y="14" text-anchor="middle">{escape(name)}</text>'
    )


def _mark(x: float, place: float, text: str) -> str:
    return (
        f'<text x="{x:.1f}" y="{_y(place) + (14 if place == 0 else -5):.1f}" text-anchor="middle">{escape(text)}</text>'
    )


def _marks(x: float, domain: Mapping[str, Sequence[Any]]) -> list[str]:
    """The ends of an axis, or every choice."""
    kind = kind_of(domain)
    if kind not in FINITE:
        return [_mark(x, 0.0, value_text(domain[kind][0])), _mark(x, 1.0, value_text(domain[kind][1]))]
    places = [(position(domain, choice), value_text(choice)) for choice in domain[kind]]
    return [_mark(x, p, text) if p in (0, 1) else _beside(x, p, text) for p, text in places]


def _beside(x: float, place: float, text: str) -> str:
    return f'<text x="{x + 5:.1f}" y="{_y(place) + 4:.1f}">{escape(text)}</text>'
