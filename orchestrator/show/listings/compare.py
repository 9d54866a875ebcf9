"""`orchestrator runs compare RUN...`: results side by side, and the keys of the jobs that differ."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from orchestrator.errors import EXIT_DONE, JobError
from orchestrator.job.load import load_job
from orchestrator.job.resolved import flatten, job_to_dict
from orchestrator.job.show import show
from orchestrator.run.folder import existing_network
from orchestrator.show.listings.runs import last_known, run_state
from orchestrator.show.terminal import amount, as_text, duration, percent

_RESULTS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("val top-1", "val_top1", percent),
    ("val top-5", "val_top5", percent),
    ("test top-1", "test_top1", percent),
    ("test top-5", "test_top5", percent),
    ("images/s", "images_per_second", lambda rate: f"{rate:.0f}"),
    ("training time", "wall_seconds", duration),
    ("steps", "steps", str),
    ("samples seen", "samples_seen", str),
    ("workers", "world_size", str),
    ("peak memory", "peak_memory_bytes", lambda peaks: amount(max(peaks), "B")),
    ("weights", "weights_sha256", lambda digest: str(digest)[:12]),
)
# A run's own name is the head of its column, and where it lies decides nothing.
LEFT_OUT = ("name", "runs")
_COLUMN = 24


@dataclass(frozen=True)
class Compared:
    """One run: a column of the tables. `job` is flat; `summary` of an unfinished run is what is last known."""

    label: str
    status: str
    summary: Mapping[str, Any]
    job: Mapping[str, Any]


def compare(runs: Sequence[Path], *, as_json: bool = False) -> int:
    """Show two or more runs side by side, as tables or as JSON.

    Raises JobError for fewer, CheckpointError for folders that are none.
    """
    if len(runs) < 2:
        raise JobError(f"runs compare: needs two runs or more, got {len(runs)}")
    found = [_read(run, label) for run, label in zip(runs, labels(runs), strict=True)]
    print(json.dumps(_plain(found), indent=1) if as_json else comparison(found))
    return EXIT_DONE


def labels(runs: Sequence[Path]) -> list[str]:
    """The names of the runs, with as many of the folders above them as it takes to tell them apart."""
    parts = [run.resolve().parts for run in runs]
    for count in range(1, max(map(len, parts))):
        found = ["/".join(part[-count:]) for part in parts]
        if len(set(found)) == len(found):
            return found
    return [str(run) for run in runs]


def _read(run: Path, label: str) -> Compared:
    folder = existing_network(run)
    status, summary = run_state(folder)
    flat = flatten(job_to_dict(load_job(folder.job)))
    known = summary or last_known(folder)
    return Compared(label, status, known, {key: value for key, value in flat.items() if key not in LEFT_OUT})


def _plain(runs: Sequence[Compared]) -> dict[str, Any]:
    """Summaries whole, and of each differing key its value in every run; null in one that has no such key."""
    keys = differing_keys([run.job for run in runs])
    return {
        "runs": [{"run": run.label, "status": run.status, "summary": run.summary} for run in runs],
        "differing": {key: [run.job.get(key) for run in runs] for key in keys},
    }


def comparison(runs: Sequence[Compared]) -> str:
    """Two tables as text: results (rows without a value in any run are left out) and differing keys."""
    width = max(110, _COLUMN * (len(runs) + 1))
    differing = differing_keys([run.job for run in runs])
    keys = _table("differing key", runs)
    for key in differing:
        keys.add_row(key, *(show(run.job[key]) if key in run.job else "-" for run in runs))
    below = as_text(keys, width) if differing else "The jobs differ in nothing but their names."
    return f"{as_text(_results(runs), width)}\n\n{below}"


def differing_keys(jobs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys that not all jobs have with the same value, in the order of the first job that has them."""
    every = dict.fromkeys(key for job in jobs for key in job)
    return [key for key in every if any(key not in job or job[key] != jobs[0].get(key) for job in jobs)]


def _results(runs: Sequence[Compared]) -> Table:
    table = _table("result", runs)
    table.add_row("status", *(run.status for run in runs))
    for label, key, text in _RESULTS:
        values = [run.summary.get(key) for run in runs]
        if any(value is not None for value in values):
            table.add_row(label, *("-" if value is None else text(value) for value in values))
    layers = [run.summary.get("layers", []) for run in runs]
    for index in range(max(map(len, layers))):
        cells = [percent(own[index]["val_top1"]) if index < len(own) else "-" for own in layers]
        table.add_row(f"layer {index} val top-1", *cells)
    return table


def _table(head: str, runs: Sequence[Compared]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(head)
    for run in runs:
        table.add_column(run.label, justify="right", overflow="fold")
    return table
