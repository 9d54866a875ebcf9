"""The pipeline and its peers in one table: rates that take turns, memory at equal micro-batches, bytes sent."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.common import spread
from benchmarks.crew import Crew, CrewError
from benchmarks.peers import SCHEDULES, STAGES, Setting, answers

ONE_PROCESS = "BP, one process"
# The memory of all schedules is compared at micro-batches of this part of the batch.
PIECES = 8


@dataclass
class _Row:
    """One method as it is measured: its crew, its name there, and what came of it."""

    label: str
    crew: Crew
    pieces: int = 1
    held: int | None = None
    held_in_pieces: int | None = None
    sent: int | None = None
    failure: str | None = None


def _prepared(label: str, setting: Setting) -> _Row:
    """Start a crew for a method, choose its micro-batches, count its memory and messages."""
    row = _Row(label, Crew(STAGES, answers, setting, timeout_s=setting.timeout_s))
    try:
        whole, in_pieces = _makers(label, setting)
        if label.endswith(tuple(SCHEDULES)):
            row.pieces = _best_micro_batches(row.crew, setting, whole)
            whole = (*whole[:-1], row.pieces)
        row.crew.call("make", "timed", *whole)
        row.held = max(row.crew.call("held", "timed"))
        row.sent = sum(row.crew.call("sent", "timed"))
        # Two pipelines over one gloo group would take each other's messages.
        with Crew(STAGES, answers, setting, timeout_s=setting.timeout_s) as crew:
            crew.call("make", "in pieces", *in_pieces)
            row.held_in_pieces = max(crew.call("held", "in pieces"))
    except CrewError as error:
        row.failure = str(error).strip().splitlines()[-1]
    return row


def _makers(label: str, setting: Setting) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """A key of MAKERS and arguments: for whole batches, and for micro-batches of the size that all are compared at."""
    kind, small, last = label.split(",")[0], setting.batch // PIECES, label.rsplit(" ", 1)[1]
    if label == "local, one process":
        return ("local alone", setting.batch), ("local alone", small)
    if kind == "local":
        return ("local", last, setting.batch, uuid.uuid4().hex[:12]), ("local", last, small, uuid.uuid4().hex[:12])
    if last in SCHEDULES:
        return ("pipelining", last, PIECES), ("pipelining", last, PIECES)
    replicated = label != ONE_PROCESS
    return ("BP", 1, replicated), ("BP", PIECES // STAGES if replicated else PIECES, replicated)


def _best_micro_batches(crew: Crew, setting: Setting, maker: tuple[Any, ...]) -> int:
    tried = {}
    for count in setting.micro_batches:
        crew.call("make", f"in {count}", *maker[:-1], count)
        tried[count] = min(max(crew.call("time", f"in {count}", 2)) for _ in range(2))
    return min(tried, key=tried.__getitem__)


LABELS = (
    "local, 2 stages, shm",
    "local, 2 stages, gloo",
    "local, one process",
    ONE_PROCESS,
    "BP, DDP, 2 replicas",
    "BP, 2 stages, GPipe",
    "BP, 2 stages, 1F1B",
)


def compare(setting: Setting, repetitions: int, window_s: float) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of the table and its notes; methods take turns, each in processes of its own."""
    rows = [_prepared(label, setting) for label in LABELS]
    times: dict[str, list[float]] = {row.label: [] for row in rows}
    for _ in range(repetitions):
        for row in rows:
            if row.failure is not None:
                continue
            try:
                probe = max(row.crew.call("time", "timed", 2)) if not times[row.label] else times[row.label][-1]
                steps = max(3, round(window_s / probe))
                times[row.label].append(max(row.crew.call("time", "timed", steps)))
            except CrewError as error:
                row.failure = str(error).strip().splitlines()[-1]
    for row in rows:
        row.crew.end()
    return _table(rows, times, setting), _notes(rows, setting)


def _table(rows: Sequence[_Row], times: dict[str, list[float]], setting: Setting) -> list[dict[str, Any]]:
    alone = times[ONE_PROCESS]

    def line(label: str, seconds: Sequence[float], row: _Row | None) -> dict[str, Any]:
        def megabytes(count: int | None) -> float | None:
            return None if count is None else 1e-6 * count

        measured = row is None or row.failure is None
        ours = times[LABELS[0]]
        return {
            "method": label,
            "micro-batches": row.pieces if row else PIECES,
            "images/s": spread([setting.batch / s for s in seconds]) if measured else None,
            "against BP in one process": spread(_ratios(alone, seconds)) if measured else None,
            "local over shm against it": spread(_ratios(seconds, ours)) if measured else None,
            "activations, MB": megabytes(row.held if row else None),
            f"at micro-batches of {setting.batch // PIECES}": megabytes(row.held_in_pieces if row else None),
            "sent per step, MB": megabytes(row.sent if row else None),
        }

    table = [line(row.label, times[row.label], row) for row in rows]
    limit = STAGES * PIECES / (PIECES + STAGES - 1)
    table.append(line(f"BP, limit of 1F1B: one process x {limit:.2f}", [s / limit for s in alone], None))
    return table


def _ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(above, below, strict=False)]


def _notes(rows: Sequence[_Row], setting: Setting) -> list[str]:
    notes = [
        "freed memory stays with the process (mallopt), as in the workers of a run; for all methods",
        f"{setting.layers} convolutions of {setting.width} channels on {setting.size} x {setting.size} maps, "
        f"batches of {setting.batch}, AdamW, channels_last; micro-batches: the fastest of "
        f"{', '.join(map(str, setting.micro_batches))}; local: none, one update per batch",
        "activations: of the larger worker, what autograd keeps and the buffers of the transport; DDP's buckets and "
        "parameters not counted. At micro-batches: BP accumulates over them, local steps on one",
        "sent per step: of all workers; DDP's reckoned for a ring; batch norms are per replica and micro-batch in BP",
        f"limit of 1F1B: p m / (m + p - 1) for p = {STAGES} stages and m = {PIECES} micro-batches, no communication",
    ]
    return notes + [f"{row.label}: not measured, {row.failure}" for row in rows if row.failure]
