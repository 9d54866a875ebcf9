"""What a worker did in some steps, span by span, and all workers' spans on one clock as a Chrome trace. No torch.

Outside the chosen steps a span is nothing: no clock is read and no device waited for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

# In the order in which a step goes through them; the last one runs beside the others.
PHASES = ("receive", "agree", "forward", "loss", "gradient", "send", "wait for sum", "update", "all-reduce")
BESIDE = "all-reduce"
# Steps of an attempt that are left out: pipelines fill and allocators grow in them.
WARM_UP_STEPS = 5
_NOTHING: AbstractContextManager[None] = nullcontext()


@dataclass(frozen=True)
class Span:
    """One phase of a step, of a layer where it has one, on this worker's clock."""

    phase: str
    layer: int | None
    step: int
    began_ns: int
    ended_ns: int


class Trace:
    """Spans of the steps in `steps`; `synchronise` waits for the device, so that a span holds its work."""

    def __init__(self, steps: range = range(0), synchronise: Callable[[], None] | None = None) -> None:
        self._steps, self._synchronise = steps, synchronise
        self._spans: list[Span] = []
        self._step = -1
        self.on = False

    def begin(self, step: int) -> None:
        """A step begins."""
        self._step, self.on = step, step in self._steps

    def end(self) -> None:
        """What comes until the next step begins is not part of one."""
        self.on = False

    @property
    def over(self) -> bool:
        """Whether the last step of `steps` has begun."""
        return self._step >= self._steps.stop - 1

    def span(self, phase: str, layer: int | None = None) -> AbstractContextManager[None]:
        """The time inside `with`, where the step is traced."""
        return self._measured(phase, layer) if self.on else _NOTHING

    def now(self) -> int:
        return time.monotonic_ns() if self.on else 0

    def since(self, began_ns: int, phase: str, layer: int | None = None) -> None:
        """A span that ends now and began at what `now` gave then."""
        if self.on:
            self._spans.append(Span(phase, layer, self._step, began_ns, time.monotonic_ns()))

    def take(self) -> list[Span]:
        """The spans since the last call."""
        taken, self._spans = self._spans, []
        return taken

    @contextmanager
    def _measured(self, phase: str, layer: int | None) -> Iterator[None]:
        began = time.monotonic_ns()
        yield
        if self._synchronise is not None:
            self._synchronise()
        self.since(began, phase, layer)


def traced_steps(wanted: int, start: int, total: int) -> range:
    """The steps to trace of those from `start` to `total`: behind the warm-up, as far as there are so many."""
    first = max(start, min(start + WARM_UP_STEPS, total - wanted))
    return range(first, min(total, first + wanted))


@dataclass(frozen=True)
class WorkerSpans:
    """All that one worker has traced, with its clock's offset."""

    rank: int
    stage: int
    replica: int
    offset_ns: int
    spans: Sequence[Span]


def chrome_trace(workers: Sequence[WorkerSpans], layer_names: Sequence[str]) -> dict[str, Any]:
    """The Trace Event Format that Perfetto and chrome://tracing read: a process for each rank, times in us.

    Sums over replicas have a thread of their own, because they run beside the rest.
    """
    starts = [span.began_ns + w.offset_ns for w in workers for span in w.spans]
    zero = min(starts, default=0)
    events: list[dict[str, Any]] = []
    for worker in workers:
        name = f"rank {worker.rank}: stage {worker.stage}, replica {worker.replica}"
        facts = {"stage": worker.stage, "replica": worker.replica}
        events.append({"ph": "M", "name": "process_name", "pid": worker.rank, "args": {"name": name, **facts}})
        events.append(
            {"ph": "M", "name": "process_sort_index", "pid": worker.rank, "args": {"sort_index": worker.stage}}
        )
        for span in sorted(worker.spans, key=lambda s: s.began_ns):
            of_layer = {} if span.layer is None else {"layer": span.layer, "layer_name": layer_names[span.layer]}
            events.append(
                {
                    "ph": "X",
                    "name": span.phase if span.layer is None else f"{span.phase} {layer_names[span.layer]}",
                    "cat": span.phase,
                    "pid": worker.rank,
                    "tid": int(span.phase == BESIDE),
                    "ts": (span.began_ns + worker.offset_ns - zero) / 1e3,
                    "dur": (span.ended_ns - span.began_ns) / 1e3,
                    "args": {"step": span.step, **of_layer},
                }
            )
    return {"displayTimeUnit": "ms", "traceEvents": events}
