"""One self-contained HTML page for one run or several: no scripts, nothing loaded from anywhere."""

from __future__ import annotations

import heapq
import json
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from orchestrator.errors import JobError
from orchestrator.job.resolved import flatten
from orchestrator.job.show import show
from orchestrator.pipeline.trace import PHASES
from orchestrator.run import checkpoint
from orchestrator.run.folder import RunFolder, read_json, write_atomically
from orchestrator.show import probes
from orchestrator.show.listings.compare import LEFT_OUT, differing_keys
from orchestrator.show.listings.runs import run_state
from orchestrator.show.pace import pace
from orchestrator.show.pages import html, plots, search_page
from orchestrator.show.pages.gantt import gantt
from orchestrator.show.terminal import amount, duration, percent

# A heat map of more classes than these shows nothing, and one of 1000 would make a page of 200 MB.
MOST_CLASSES = 100
_PAIRS = 24


def write_report(run_dirs: Sequence[Path], out: Path) -> None:
    """Write the page of these run folders; finished, stopped and running ones alike.

    Raises JobError where it cannot be written.
    """
    searches = [folder for folder in run_dirs if search_page.is_search(folder)]
    runs = [_Run(folder) for folder in run_dirs if folder not in searches]
    title = run_dirs[0].resolve().name if len(run_dirs) == 1 else f"{len(run_dirs)} runs"
    body = [f"<h1>{escape(title)}</h1>"]
    if len(runs) > 1:
        body.append(_comparison(runs))
    for run in runs:
        body += _sections(run, titled=len(run_dirs) > 1)
    for folder in searches:
        body += [f"<h2>{escape(folder.resolve().name)}</h2>"] if len(run_dirs) > 1 else []
        body += search_page.sections(folder)
    page = html.page(title, body)
    try:
        write_atomically(out, page)
    except OSError as error:
        raise JobError(f"{out}: cannot be written: {error.strerror}; choose another place with --out") from None


class _Run:
    """What the page knows of one run."""

    def __init__(self, path: Path) -> None:
        folder = RunFolder(path)
        self.path, self.name = path, path.resolve().name
        self.summary: dict[str, Any] = read_json(folder.summary) or {}
        self.confusion: dict[str, Any] | None = read_json(folder.confusion)
        self.mistakes: list[dict[str, Any]] = read_json(folder.mistakes) or []
        self.probe: dict[str, Any] | None = read_json(folder.probe)
        self.classes: list[str] = read_json(folder.classes) or []
        self.trace: dict[str, Any] | None = read_json(folder.trace)
        self.attempts: list[dict[str, Any]] = read_json(folder.attempts) or []
        self.job = folder.job.read_text(encoding="utf-8")
        self.events, _ = folder.read_events()
        plans = [e for e in self.events if e["event"] == "plan"]
        self.plan: dict[str, Any] = plans[-1] if plans else {"stages": [], "layer_names": []}
        self.stages = next((e for e in reversed(self.events) if e["event"] == "stages"), None)
        self.epochs = [e for e in self.events if e["event"] == "epoch"]

    @property
    def names(self) -> list[str]:
        return list(self.plan["layer_names"])


def _comparison(runs: Sequence[_Run]) -> str:
    """The numbers of several runs side by side, and their accuracy in one plot."""
    head = ("run", "val top-1", "test top-1", "epochs", "images/s", "wall", "seed")
    rows = []
    for run in runs:
        s = run.summary
        rate = s.get("images_per_second")
        rows.append(
            (
                run.name,
                percent(s.get("val_top1")),
                percent(s.get("test_top1")),
                str(s.get("epochs", "-")),
                "-" if rate is None else f"{rate:.0f}",
                duration(s["wall_seconds"]) if "wall_seconds" in s else "not finished",
                str(s.get("seed", "-")),
            )
        )
    curves = {run.name: _accuracy(run) for run in runs}
    drawn = plots.line_plot({n: c for n, c in curves.items() if c}, x_label="epoch", y_label="val top-1", percent=True)
    return (
        html.card("Side by side", html.table(head, rows))
        + html.plot_card("val top-1 over epochs", drawn, list(curves))
        + html.card("What differs in their jobs", _differing(runs))
    )


def _accuracy(run: _Run) -> list[tuple[float, float]]:
    """(epoch, val top-1) as far as it was measured, that of the final weights last."""
    points, epoch = [], 0.0
    for event in run.events:
        epoch = float(event["epoch"]) if event["event"] == "epoch" else epoch
        if event["event"] in ("epoch", "final") and event["val_top1"] is not None:
            points.append((epoch, float(event["val_top1"])))
    return points


def _differing(runs: Sequence[_Run]) -> str:
    """The keys that not all jobs have with the same value, beside one another."""
    jobs = [flatten(yaml.safe_load(run.job)) for run in runs]
    keys = [key for key in differing_keys(jobs) if key not in LEFT_OUT]
    if not keys:
        return '<p class="dim">Nothing but their names.</p>'
    rows = [(key, *(show(job[key]) if key in job else "-" for job in jobs)) for key in keys]
    return html.table(("key", *(run.name for run in runs)), rows)


def _sections(run: _Run, *, titled: bool) -> list[str]:
    s = run.summary
    parts = [f"<h2>{escape(run.name)}</h2>" if titled else "", _numbers(run), _state(run), '<div class="grid">']
    accuracy = plots.line_plot(
        plots.layer_curves(run.events, run.names), x_label="epoch", y_label="val top-1", percent=True
    )
    parts.append(html.plot_card("Accuracy of each layer over epochs", accuracy, _numbered(run.names)))
    parts.append(html.plot_card("Training loss of each layer", _curves(run, "train_loss"), _numbered(run.names)))
    if any(x is not None for e in run.epochs for x in e.get("scale") or []):
        parts.append(html.plot_card("Scale of each layer's logits", _curves(run, "scale"), _numbered(run.names)))
    layers = [(f"{x['index']} {x['name']}", x["val_top1"]) for x in s.get("layers", [])]
    if s.get("vote_weights"):
        rows = [(name, f"{weight:.3f}") for (name, _), weight in zip(layers, s["vote_weights"], strict=True)]
        parts.append(html.card("Fitted weight of each layer's vote", html.table(("layer", "weight"), rows)))
    if layers and layers[0][1] is not None:
        parts.append(html.plot_card("Accuracy of each layer at the end", plots.bar_plot(layers), []))
    if s.get("controls"):
        parts.append(html.card("Controls on the same data", _controls(s["controls"])))
    parts.append(html.plot_card("Images per second", _per_epoch(run, lambda e: {"all": e["images_per_second"]}), []))
    busy = _per_epoch(run, lambda e: {f"stage {i}": b for i, b in enumerate(e["busy_fraction"])}, percent_axis=True)
    stages = [f"stage {i}" for i in range(len(run.plan["stages"]))]
    parts.append(html.plot_card("Share of time that each stage computes", busy, stages))
    said = pace(run.events)
    if said:
        parts.append(html.card("What sets the pace", f"<p>{escape(said)}</p>{_skipped(run)}"))
    parts.append(html.card("Plan", _plan(run)))
    if run.stages is not None:
        parts.append(html.card("Where the time of the stages went", _stage_times(run.stages)))
    if run.confusion is not None:
        parts.append(_confusion(run.confusion["matrix"], run.confusion["classes"]))
    if run.probe is not None:
        parts += probes.cards(run.probe, run.classes)
    parts.append(html.card("Attempts", _attempts(run)))
    parts.append("</div>")
    if run.mistakes:
        parts.append(html.card("Validation images that it is most sure of, and wrong about", _mistakes(run)))
    if run.trace is not None:
        steps = {e["args"]["step"] for e in run.trace["traceEvents"] if e["ph"] == "X"}
        title = f"Steps {min(steps)} to {max(steps)} of all workers" if steps else "Traced steps"
        parts.append(html.plot_card(title, gantt(run.trace), PHASES))
    parts.append(html.card("Job", f"<pre>{escape(run.job)}</pre>"))
    if s:
        facts = {k: s[k] for k in ("weights_sha256", "order_sha256", "job_sha256", "index_sha256", "versions")}
        parts.append(html.card("What it is made of", f"<pre>{escape(json.dumps(facts, indent=1))}</pre>"))
    return parts


def _confusion(matrix: Sequence[Sequence[int]], classes: Sequence[str]) -> str:
    """Every class against every other or, of more classes than a picture shows, the pairs that are confused most."""
    title = "Confusion of the final network on the validation data"
    if len(classes) <= MOST_CLASSES:
        return html.plot_card(title, plots.heat_map(matrix, classes), [])
    wrong = ((count, t, p) for t, row in enumerate(matrix) for p, count in enumerate(row) if count and t != p)
    most = heapq.nsmallest(_PAIRS, wrong, key=lambda pair: (-pair[0], pair[1:]))
    rows = [(classes[t], classes[p], str(count)) for count, t, p in most]
    return html.card(f"{title}: the {len(rows)} pairs confused most", html.table(("is", "called", "images"), rows))


def _controls(controls: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        (name, percent(c["val_top1"]), percent(c["test_top1"]), duration(c["seconds"])) for name, c in controls.items()
    ]
    return html.table(("control", "val top-1", "test top-1", "training"), rows)


def _numbers(run: _Run) -> str:
    s = run.summary
    status, _ = run_state(RunFolder(run.path))
    rate = s.get("images_per_second")
    shown = {
        "status": status,
        "val top-1": percent(s.get("val_top1")),
        "val top-5": percent(s.get("val_top5")),
        "test top-1": percent(s.get("test_top1")),
        "images/s": "-" if rate is None else f"{rate:.0f}",
        "training time": duration(s["wall_seconds"]) if s else "-",
        "workers": str(s.get("world_size", run.plan.get("workers", "-"))),
        "pipeline efficiency": percent(s.get("pipeline_efficiency")),
        **({"weights that count": s["evaluated_weights"]} if "evaluated_weights" in s else {}),
        "peak memory": amount(max(s["peak_memory_bytes"]), "B") if s else "-",
    }
    return html.numbers(shown)


def _state(run: _Run) -> str:
    """What a run that is not finished has come to: the error that ended it, and whose weights it has."""
    folder = RunFolder(run.path)
    steps = checkpoint.steps_found(folder)
    error = None if run.summary else folder.failure()
    lines = [f"It failed: {error}"] if error else []
    lines += [said] if steps and (said := folder.unfinished(steps[-1])) else []
    return "".join(f"<p>{escape(line)}</p>" for line in lines)


def _numbered(names: Sequence[str]) -> list[str]:
    return [f"{i} {name}" for i, name in enumerate(names)]


def _curves(run: _Run, key: str) -> str:
    """A number of each layer over epochs."""
    curves = {
        name: [(float(e["epoch"]), e[key][i]) for e in run.epochs if e.get(key) and e[key][i] is not None]
        for i, name in enumerate(_numbered(run.names))
    }
    return plots.line_plot({n: c for n, c in curves.items() if c}, x_label="epoch", y_label=key.replace("_", " "))


def _per_epoch(
    run: _Run, values: Callable[[Mapping[str, Any]], dict[str, float]], *, percent_axis: bool = False
) -> str:
    curves: dict[str, list[tuple[float, float]]] = {}
    for event in run.epochs:
        for name, value in values(event).items():
            curves.setdefault(name, []).append((float(event["epoch"]), value))
    return plots.line_plot(curves, x_label="epoch", y_label="", percent=percent_axis, from_zero=True)


def _skipped(run: _Run) -> str:
    """Images that the last attempt left out, by reason."""
    counts = (run.epochs[-1].get("skipped") or {}) if run.epochs else {}
    rows = [(reason, str(count)) for reason, count in sorted(counts.items())]
    return html.table(("left out", "images"), rows) if rows else ""


def _plan(run: _Run) -> str:
    head = ("stage", "layers", "replicas", "parameters", "memory", "compute", "sent per step")
    rows = []
    for stage in run.plan["stages"]:
        first, last = stage["layers"]
        rows.append(
            (
                str(stage["index"]),
                ", ".join(run.names[first : last + 1]),
                str(stage["replicas"]),
                amount(stage["parameters"]),
                amount(stage["memory_bytes"], "B"),
                f"{100 * stage['compute_share']:.0f} %",
                amount(stage["bytes_sent_per_step"], "B"),
            )
        )
    return html.table(head, rows)


def _stage_times(event: Mapping[str, Any]) -> str:
    head = ("stage", "busy", "waits for input", "for output", "for sums over replicas")
    keys = [f"{key}_fraction" for key in ("busy", "wait_input", "wait_output", "all_reduce")]
    rows = [(str(i), *(f"{100 * s[key]:.0f} %" for key in keys)) for i, s in enumerate(event["stages"])]
    advice = f"<p>{escape(event['advice'])}</p>" if event["advice"] else ""
    return html.table(head, rows) + advice


def _mistakes(run: _Run) -> str:
    return html.sheet(
        [
            (m["jpeg"], (f"is {m['target']}", f"called {m['predicted']}", f"{100 * m['probability']:.1f} %", _file(m)))
            for m in run.mistakes
        ]
    )


def _file(mistake: Mapping[str, Any]) -> str:
    """What an image was called in the source of the data, or its key there."""
    return str(mistake.get("name") or mistake["key"])


def _start(run: _Run) -> str:
    """Seconds to the first step of each attempt, by what they went into."""
    starts = [e["seconds"] for e in run.events if e["event"] == "first_step"]
    parts = list(dict.fromkeys(part for seconds in starts for part in seconds))
    rows = [
        (str(i + 1), f"{sum(s.values()):.1f}", *(f"{s[part]:.1f}" if part in s else "-" for part in parts))
        for i, s in enumerate(starts)
    ]
    return html.table(("start", "seconds", *parts), rows) if rows else ""


def _attempts(run: _Run) -> str:
    rows = [
        (str(a["attempt"]), str(a["first_step"]), "-" if a["last_step"] is None else str(a["last_step"]))
        for a in run.attempts
    ]
    return html.table(("attempt", "first step", "last step"), rows) + _start(run)
