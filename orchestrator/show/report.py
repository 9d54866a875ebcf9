"""One self-contained HTML page for one run or several: no scripts, nothing loaded from anywhere."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from orchestrator.run.folder import RunFolder, read_json, write_atomically
from orchestrator.show import plots
from orchestrator.show.terminal import amount, duration, percent

_STYLE = """
:root{color-scheme:light dark;--line:#8884;--card:#8881;--dim:#778}
*{box-sizing:border-box}
body{font:15px/1.5 system-ui,sans-serif;margin:0 auto;padding:1rem;max-width:1240px}
h1{font-size:1.5rem;margin:.2rem 0}h2{font-size:1.1rem;margin:1.6rem 0 .4rem}
.dim{color:var(--dim)}.grid{display:grid;gap:1rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr))}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:.8rem 1rem;min-width:0}
.card h3{margin:0 0 .4rem;font-size:.95rem}.numbers{display:flex;flex-wrap:wrap;gap:.6rem;margin:.8rem 0}
.numbers div{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:.5rem .9rem}
.numbers b{display:block;font-size:1.25rem}.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.9rem}
td,th{padding:.2rem .7rem .2rem 0;text-align:right;white-space:nowrap}td:first-child,th:first-child{text-align:left}
svg{width:100%;height:auto;display:block}pre{overflow-x:auto;font-size:.82rem;margin:.4rem 0}
.key{display:flex;flex-wrap:wrap;gap:.2rem .9rem;font-size:.82rem}.key i{display:inline-block;width:.8em;height:.8em;
border-radius:2px;margin-right:.3em}code{overflow-wrap:anywhere}body>.card,.grid{margin-top:1rem}
"""


def write_report(run_dirs: Sequence[Path], out: Path) -> None:
    """Write the page of these run folders; finished, stopped and running ones alike."""
    runs = [_Run(folder) for folder in run_dirs]
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    body = [f"<h1>{escape(title)}</h1>"]
    if len(runs) > 1:
        body.append(_comparison(runs))
    for run in runs:
        body += _sections(run, titled=len(runs) > 1)
    stamp = time.strftime("%Y-%m-%d %H:%M:%S")
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>"
        + "".join(body)
        + f'<p class="dim">Written {stamp}</p></body></html>\n'
    )
    write_atomically(out, page)


class _Run:
    """What the page knows of one run."""

    def __init__(self, path: Path) -> None:
        folder = RunFolder(path)
        self.path, self.name = path, path.resolve().name
        self.summary: dict[str, Any] = read_json(folder.summary) or {}
        self.confusion: dict[str, Any] | None = read_json(folder.confusion)
        self.progress: dict[str, Any] = read_json(folder.progress) or {}
        self.attempts: list[dict[str, Any]] = read_json(folder.attempts) or []
        self.job = folder.job.read_text(encoding="utf-8")
        self.events, _ = folder.read_events()
        plans = [e for e in self.events if e["event"] == "plan"]
        self.plan: dict[str, Any] = plans[-1] if plans else {"stages": [], "layer_names": []}
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
    curves = {
        run.name: [(float(e["epoch"]), e["val_top1"]) for e in run.epochs if e["val_top1"] is not None] for run in runs
    }
    drawn = plots.line_plot({n: c for n, c in curves.items() if c}, x_label="epoch", y_label="val top-1", percent=True)
    return _card("Side by side", _table(head, rows)) + _plot_card("val top-1 over epochs", drawn, list(curves))


def _sections(run: _Run, *, titled: bool) -> list[str]:
    s = run.summary
    parts = [f"<h2>{escape(run.name)}</h2>" if titled else "", _numbers(run), '<div class="grid">']
    accuracy = plots.line_plot(
        plots.layer_curves(run.events, run.names), x_label="epoch", y_label="val top-1", percent=True
    )
    parts.append(_plot_card("Accuracy of each layer over epochs", accuracy, _numbered(run.names)))
    parts.append(_plot_card("Training loss of each layer", _losses(run), _numbered(run.names)))
    layers = [(f"{x['index']} {x['name']}", x["val_top1"]) for x in s.get("layers", [])]
    if layers and layers[0][1] is not None:
        parts.append(_plot_card("Accuracy of each layer at the end", plots.bar_plot(layers), []))
    parts.append(_plot_card("Images per second", _per_epoch(run, lambda e: {"all": e["images_per_second"]}), []))
    busy = _per_epoch(run, lambda e: {f"stage {i}": b for i, b in enumerate(e["busy_fraction"])}, percent_axis=True)
    stages = [f"stage {i}" for i in range(len(run.plan["stages"]))]
    parts.append(_plot_card("Share of time that each stage computes", busy, stages))
    parts.append(_card("Plan", _plan(run)))
    if run.confusion is not None:
        drawn = plots.heat_map(run.confusion["matrix"], run.confusion["classes"])
        parts.append(_plot_card("Confusion of the final network on the validation data", drawn, []))
    parts.append(_card("Attempts", _attempts(run)))
    parts.append("</div>")
    parts.append(_card("Job", f"<pre>{escape(run.job)}</pre>"))
    if s:
        facts = {k: s[k] for k in ("weights_sha256", "order_sha256", "job_sha256", "index_sha256", "versions")}
        parts.append(_card("What it is made of", f"<pre>{escape(json.dumps(facts, indent=1))}</pre>"))
    return parts


def _numbers(run: _Run) -> str:
    s = run.summary
    status = s.get("status") or f"at step {run.progress.get('step', 0)} of {run.progress.get('steps_total', '?')}"
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
        "peak memory": amount(max(s["peak_memory_bytes"]), "B") if s else "-",
    }
    cells = "".join(f'<div><span class="dim">{k}</span><b>{escape(v)}</b></div>' for k, v in shown.items())
    return f'<div class="numbers">{cells}</div>'


def _numbered(names: Sequence[str]) -> list[str]:
    return [f"{i} {name}" for i, name in enumerate(names)]


def _losses(run: _Run) -> str:
    curves = {
        name: [(float(e["epoch"]), e["train_loss"][i]) for e in run.epochs if e["train_loss"][i] is not None]
        for i, name in enumerate(_numbered(run.names))
    }
    return plots.line_plot({n: c for n, c in curves.items() if c}, x_label="epoch", y_label="loss")


def _per_epoch(
    run: _Run, values: Callable[[Mapping[str, Any]], dict[str, float]], *, percent_axis: bool = False
) -> str:
    curves: dict[str, list[tuple[float, float]]] = {}
    for event in run.epochs:
        for name, value in values(event).items():
            curves.setdefault(name, []).append((float(event["epoch"]), value))
    return plots.line_plot(curves, x_label="epoch", y_label="", percent=percent_axis, from_zero=True)


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
    return _table(head, rows)


def _attempts(run: _Run) -> str:
    rows = [
        (str(a["attempt"]), str(a["first_step"]), "-" if a["last_step"] is None else str(a["last_step"]))
        for a in run.attempts
    ]
    return _table(("attempt", "first step", "last step"), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(c)}</th>" for c in head)
    lines = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{top}</tr>{lines}</table></div>'


def _card(title: str, content: str) -> str:
    return f'<section class="card"><h3>{escape(title)}</h3>{content}</section>'


def _plot_card(title: str, drawn: str, names: Sequence[str]) -> str:
    """A plot with its key; a line where there is nothing to draw yet."""
    key = "".join(f'<span><i style="background:{plots.colour(i)}"></i>{escape(n)}</span>' for i, n in enumerate(names))
    content = drawn + (f'<div class="key">{key}</div>' if key else "")
    return _card(title, content if drawn else '<p class="dim">Nothing measured yet.</p>')
