"""Traces: what is traced and what is not, workers' clocks brought together, the chart."""

from __future__ import annotations

import itertools
import re
import time
from typing import Any

import pytest
import torch

from hff import HeadOptions, VggOptions, build_layers
from orchestrator.pipeline.stage import Stage, StageInput
from orchestrator.pipeline.trace import Span, Trace, WorkerSpans, chrome_trace, traced_steps
from orchestrator.run.records import tracing
from orchestrator.show.pages.gantt import gantt
from tests.pipeline.ranks import run_ranks
from tests.stages import lone_stage

STEP = ["forward", "loss", "gradient", "update"]


def trained(trace: Trace, steps: int) -> Stage:
    layers = build_layers(VggOptions(widths=(4, 4)), (3, 8, 8), HeadOptions(num_classes=3), seed=0)
    stage = lone_stage(layers, first=2, trace=trace)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        trace.begin(step)
        stage.train_step(StageInput(step, torch.randn(4, 3, 8, 8, generator=generator), torch.tensor([0, 1, 2, 1])))
        trace.end()
    return stage


def test_only_traced_steps_wait_for_the_device_and_leave_spans() -> None:
    waits: list[int] = []
    trace = Trace(range(1, 3), lambda: waits.append(trace._step))
    trained(trace, 5)
    spans = trace.take()
    assert [(s.step, s.layer, s.phase) for s in spans] == [
        (step, layer, phase) for step in (1, 2) for layer in (2, 3) for phase in STEP
    ]
    assert waits == [s.step for s in spans], "once for each span, in no other step"
    assert all(a.ended_ns <= b.began_ns for a, b in itertools.pairwise(spans))
    assert trace.take() == []


def test_tracing_does_not_change_a_bit() -> None:
    traced, plain = trained(Trace(range(4)), 4), trained(Trace(), 4)
    for ours, theirs in zip(traced.layers, plain.layers, strict=True):
        for name, value in ours.state_dict().items():
            assert torch.equal(value, theirs.state_dict()[name])


@pytest.mark.parametrize(
    ("wanted", "start", "total", "steps"),
    [
        (3, 0, 100, range(5, 8)),
        (3, 40, 100, range(45, 48)),
        (3, 97, 100, range(97, 100)),
        (3, 99, 100, range(99, 100)),
        (50, 0, 10, range(10)),
        (0, 0, 10, range(5, 5)),
    ],
)
def test_the_steps_behind_the_warm_up_are_traced_as_far_as_there_are_so_many(
    wanted: int, start: int, total: int, steps: range
) -> None:
    assert traced_steps(wanted, start, total) == steps


def test_clocks_are_brought_together_and_times_count_from_the_first_span() -> None:
    here = WorkerSpans(0, 0, 0, 0, [Span("send", None, 7, 5_000_000, 6_000_000)])
    there = WorkerSpans(1, 1, 0, -2_000_000_000, [Span("forward", 1, 7, 2_006_000_000, 2_009_500_000)])
    trace = chrome_trace([here, there], ["conv0", "conv1"])
    found = [(e["pid"], e["name"], e["ts"], e["dur"]) for e in trace["traceEvents"] if e["ph"] == "X"]
    assert found == [(0, "send", 0.0, 1000.0), (1, "forward conv1", 1000.0, 3500.0)]


def _offset(rank: int, ahead_s: float) -> int:
    """Three workers on a host each, as far as they know; the clock of rank r is r times `ahead_s` ahead."""
    real = time.monotonic_ns

    class Clock:
        @staticmethod
        def monotonic_ns() -> int:
            return real() + int(1e9 * rank * ahead_s)

    tracing.time = Clock  # type: ignore[assignment]
    tracing.host_id = lambda: f"host {rank}"  # type: ignore[assignment]
    return tracing.clock_offset_ns(rank, 3, None)


def test_the_clock_of_another_host_is_measured() -> None:
    offsets = run_ranks(3, _offset, 5.0)
    assert offsets[0] == 0
    assert [offset / 1e9 for offset in offsets] == pytest.approx([0.0, -5.0, -10.0], abs=1.0)


def test_the_chart_has_a_row_for_each_worker_in_order_of_stages_and_a_bar_for_each_span() -> None:
    spans = [Span("forward", 0, 3, 0, 4_000_000), Span("all-reduce", 0, 3, 4_000_000, 5_000_000)]
    workers = [WorkerSpans(0, 1, 0, 0, spans), WorkerSpans(1, 0, 0, 0, spans[:1])]
    drawn = gantt(chrome_trace(workers, ["<a>"]))
    rows = [int(y) for y in re.findall(r'y="(\d+)" text-anchor="end">rank', drawn)]
    assert re.findall(r"rank \d: stage \d", drawn) == ["rank 1: stage 0", "rank 0: stage 1"]
    assert rows == sorted(rows)
    bars: list[Any] = re.findall(r'<rect x="([\d.]+)" y="(\d+)" width="([\d.]+)"', drawn)
    assert len(bars) == 3
    longest = max(float(width) for _, _, width in bars)
    assert min(float(width) for _, _, width in bars) == pytest.approx(longest / 4, rel=0.01)
    assert "<title>forward &lt;a&gt;, step 3: 4 ms</title>" in drawn
    assert gantt(chrome_trace([WorkerSpans(0, 0, 0, 0, [])], [])) == ""
