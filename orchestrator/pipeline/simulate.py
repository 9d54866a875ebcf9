"""The schedule of a pipeline played through: filling, waiting for input, full buffers, time on the links. Pure.

The workers of a stage wait for one another in every step (batch norm, gradient sums), so a stage is one clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.pipeline.mesh import SLOTS
from orchestrator.pipeline.stage_cost import StageSeconds

# Steps that are played; what follows goes on at the pace of their second half.
_PLAYED = 1000


@dataclass(frozen=True)
class Played:
    """Seconds of a whole epoch: in all, and per stage at work, waiting for input and waiting for a free buffer."""

    total_s: float
    work_s: tuple[float, ...]
    wait_input_s: tuple[float, ...]
    wait_output_s: tuple[float, ...]


def simulate(stages: Sequence[StageSeconds], steps: int, *, latency_s: float = 0.0, slots: int = SLOTS) -> Played:
    """Play `steps` steps of a pipeline with `slots` buffers on each link.

    A stage begins a step when it has ended the one before and the activation is there; a send waits until the
    next stage has given back a buffer; a link carries one message at a time.
    """
    played = min(steps, max(_PLAYED, 20 * len(stages)))
    last = len(stages) - 1
    free = [0.0] * len(stages)
    link_free = [0.0] * len(stages)
    wait_in, wait_out = [0.0] * len(stages), [0.0] * len(stages)
    asked: list[list[float]] = [[] for _ in stages]
    ends: list[float] = []
    for step in range(played):
        arrived = 0.0
        for k, stage in enumerate(stages):
            asked[k].append(free[k])
            start = max(free[k], arrived)
            wait_in[k] += start - free[k]
            sent = start + stage.work_s - stage.after_send_s
            if k < last:
                # Asking for message t gives back the buffer of message t - 1.
                next_asked = step - slots + 1
                given_back = asked[k + 1][next_asked] if next_asked > 0 else 0.0
                wait_out[k] += max(0.0, given_back - sent)
                sent = max(sent, given_back)
                on_link = max(sent, link_free[k])
                busy = max(stage.out_s, stages[k + 1].in_s)
                link_free[k] = on_link + busy
                arrived = on_link + busy + latency_s
            free[k] = sent + stage.after_send_s
        ends.append(free[last])
    total = max(free)
    more = steps - played
    if more:
        half = played // 2
        total += more * (ends[-1] - ends[half - 1]) / (played - half)
    scale = steps / played
    return Played(
        total_s=total,
        work_s=tuple(stage.work_s * steps for stage in stages),
        wait_input_s=tuple(w * scale for w in wait_in),
        wait_output_s=tuple(w * scale for w in wait_out),
    )
