"""The schedule played through, against times that follow from its rules by hand and against an event queue."""

from __future__ import annotations

import heapq
import random
from collections.abc import Generator, Sequence

import pytest

from orchestrator.pipeline.mesh import SLOTS
from orchestrator.pipeline.simulate import simulate
from orchestrator.pipeline.stage_cost import StageSeconds


def stage(work_s: float, *, after_send_s: float = 0.0, out_s: float = 0.0, in_s: float = 0.0) -> StageSeconds:
    return StageSeconds(work_s, work_s, 0.0, 0.0, after_send_s, out_s, in_s)


def test_equal_stages_take_one_step_each_to_fill_and_then_never_wait() -> None:
    played = simulate([stage(2.0)] * 4, steps=50)
    assert played.total_s == 3 * 2.0 + 50 * 2.0
    assert played.wait_input_s == (0.0, 2.0, 4.0, 6.0)
    assert played.wait_output_s == (0.0,) * 4


def test_what_comes_after_the_send_does_not_delay_the_next_stage() -> None:
    assert simulate([stage(2.0, after_send_s=0.5)] * 2, steps=10).total_s == 1.5 + 10 * 2.0


def test_a_link_hides_behind_the_work_until_it_is_slower() -> None:
    fast = simulate([stage(2.0, out_s=1.0), stage(2.0, in_s=1.0)], steps=100, latency_s=0.25)
    assert fast.total_s == 2.0 + 1.0 + 0.25 + 100 * 2.0
    slow = simulate([stage(2.0, out_s=3.0), stage(2.0, in_s=1.0)], steps=100)
    assert slow.total_s == 2.0 + 100 * 3.0 + 2.0


def test_a_slow_last_stage_holds_up_the_first_once_all_buffers_are_full() -> None:
    steps = 100
    played = simulate([stage(1.0), stage(3.0)], steps=steps)
    assert played.total_s == 1.0 + steps * 3.0
    # The first is ahead by its buffers at the end: the rest of the difference it has waited.
    assert played.wait_output_s[0] == pytest.approx(2.0 * steps - 3.0 * SLOTS, abs=3.0 * 2)
    assert played.wait_input_s[0] == 0.0


def test_a_long_epoch_goes_on_at_its_pace() -> None:
    played = simulate([stage(1.0), stage(2.0), stage(1.5)], steps=10_000)
    assert played.total_s == pytest.approx(1.0 + 2.0 * 10_000 + 1.5)
    assert played.wait_input_s[2] == pytest.approx(0.5 * 10_000, rel=0.01)


def by_events(stages: Sequence[StageSeconds], steps: int, latency_s: float) -> list[float]:
    """The same rules as processes that pass messages: when each of them ends."""
    queues: list[list[float]] = [[] for _ in stages]  # when each message has arrived
    asked = [0] * len(stages)
    link_free = [0.0] * len(stages)
    blocked: list[tuple[int, Generator[float | None, float, None]]] = []
    ended = [0.0] * len(stages)

    def run(k: int) -> Generator[float | None, float, None]:
        """Yields the time at which to go on, or None to be asked again after the next event."""
        now = 0.0
        for step in range(steps):
            asked[k] = step
            if k:
                while len(queues[k]) <= step:
                    now = max(now, (yield None) or now)
                now = max(now, queues[k][step])
            now = yield now + stages[k].work_s - stages[k].after_send_s
            if k + 1 < len(stages):
                while step >= SLOTS and asked[k + 1] < step - SLOTS + 1:
                    now = max(now, (yield None) or now)
                on_link = max(now, link_free[k]) + max(stages[k].out_s, stages[k + 1].in_s)
                link_free[k] = on_link
                queues[k + 1].append(on_link + latency_s)
            now = yield now + stages[k].after_send_s
        ended[k] = now

    order = 0
    events: list[tuple[float, int, int, Generator[float | None, float, None]]] = []

    def go_on(k: int, process: Generator[float | None, float, None], time: float | None) -> None:
        nonlocal order
        try:
            wanted = next(process) if time is None else process.send(time)
        except StopIteration:
            return
        if wanted is None:
            blocked.append((k, process))
        else:
            order += 1
            heapq.heappush(events, (wanted, order, k, process))

    for k in range(len(stages)):
        go_on(k, run(k), None)
    while events:
        time, _, k, process = heapq.heappop(events)
        go_on(k, process, time)
        waiting, blocked[:] = list(blocked), []
        for other, process in waiting:
            go_on(other, process, time)
    return ended


def test_any_pipeline_ends_when_an_event_queue_says_so() -> None:
    dice = random.Random(0)
    for _ in range(100):
        stages = [
            stage(dice.uniform(1, 3), after_send_s=dice.uniform(0, 0.9), out_s=dice.uniform(0, 3), in_s=dice.random())
            for _ in range(dice.randint(1, 5))
        ]
        latency = dice.random()
        steps = dice.randint(1, 30)
        played = simulate(stages, steps, latency_s=latency)
        expected = by_events(stages, steps, latency)
        assert played.total_s == pytest.approx(max(expected))
        clocks = zip(played.work_s, played.wait_input_s, played.wait_output_s, strict=True)
        assert [sum(clock) for clock in clocks] == pytest.approx(expected)
