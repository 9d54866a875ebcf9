"""What a search shows in a terminal: a line for each start and end, a table at the end."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from orchestrator.job.show import show
from orchestrator.search.record import Trial
from orchestrator.show.terminal import as_text, duration, percent, program


def values_text(values: Mapping[str, Any]) -> str:
    """The values of a trial on one line, by the last word of each path."""
    return ", ".join(f"{path.rpartition('.')[2]} {value_text(value)}" for path, value in values.items())


def value_text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else show(value).strip("'")


def metric_text(metric: str, value: float | None) -> str:
    """An accuracy in percent, a loss as it is."""
    if value is None:
        return "-"
    return percent(value) if metric.startswith("val_") else f"{value:.4f}"


def start_line(trial: Trial, total: int, *, again: bool) -> str:
    layer = "" if trial.layer is None else f"layer {trial.layer}: "
    return f"trial {trial.index:>3} of {total} {'goes on' if again else 'starts '}  {layer}{values_text(trial.values)}"


def end_line(trial: Trial, total: int, metric: str) -> str:
    head = f"trial {trial.index:>3} of {total} "
    if trial.status == "failed":
        why = (trial.message or "").split("\n")[0]
        return f"{head}failed   {why}"
    epochs = trial.curve[-1][0]
    cost = "" if trial.seconds is None else f", {duration(trial.seconds)} of training"
    return (
        f"{head}{trial.status}  {metric} {metric_text(metric, trial.metric)} after {epochs} epochs{cost}  "
        f"({values_text(trial.values)})"
    )


def search_table(summary: Mapping[str, Any], folder: Path, tracking_uri: str) -> str:
    """Every trial, the best first, and where to look next."""
    metric, trials = summary["metric"], summary["trials"]
    paths = list(trials[0]["values"]) if trials else []
    layered = any(t["layer"] is not None for t in trials)
    table = Table(box=None, pad_edge=False)
    columns = ["trial", *(["layer"] if layered else []), "status", metric, "epochs", "training"]
    for column in (*columns, *(path.rpartition(".")[2] for path in paths)):
        table.add_column(column, justify="left" if column == "status" else "right")
    for t in in_order(trials, summary["mode"]):
        table.add_row(
            str(t["index"]),
            *([str(t["layer"])] if layered else []),
            t["status"],
            metric_text(metric, t["metric"]),
            str(t["curve"][-1][0]) if t["curve"] else "-",
            "-" if t["seconds"] is None else duration(t["seconds"]),
            *(value_text(t["values"][path]) for path in paths),
        )
    best = summary["best"]
    counted = ", ".join(f"{count} {status}" for status, count in summary["counts"].items() if count)
    lines = [
        f"Result of {summary['name']}",
        as_text(table),
        f"Best: trial {best['index']}, {metric} {metric_text(metric, best['metric'])} ({'; '.join(best['words'])})",
        f"{len(trials)} trials ({counted}), {duration(summary['train_seconds'])} of training in "
        f"{duration(summary['wall_seconds'])}",
        f"Search folder  {folder}",
        f"Best job       {program('orchestrator')} run {shlex.quote(str(folder / 'best.yaml'))}",
        f"Report         {program('orchestrator')} report {shlex.quote(str(folder))}",
    ]
    if tracking_uri.startswith("sqlite"):
        tracking_uri = f"{program('mlflow')} ui --backend-store-uri {tracking_uri}"
    return "\n".join([*lines, f"MLflow         {tracking_uri}"])


def in_order(trials: Sequence[Mapping[str, Any]], mode: str) -> list[Mapping[str, Any]]:
    """The upper layers first, then finished before stopped before failed ones, the best metric first."""
    sign = 1 if mode == "max" else -1
    rank = {"finished": 0, "stopped": 1, "running": 2, "failed": 3}
    return sorted(
        trials,
        key=lambda t: (
            -(t["layer"] or 0),
            rank[t["status"]],
            float("inf") if t["metric"] is None else -sign * t["metric"],
            t["index"],
        ),
    )
