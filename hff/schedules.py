"""Learning rates as pure functions of the step. No torch."""

from __future__ import annotations

import math

SCHEDULES = ("constant", "cosine", "one-cycle")
_ONE_CYCLE_RISE = 0.15


def learning_rate(step: int, total_steps: int, *, base_lr: float, schedule: str, warmup_steps: int = 0) -> float:
    """The rate of step 0 <= step < total_steps.

    `constant` stays at `base_lr`; `cosine` falls to zero along a half cosine; `one-cycle` rises linearly for the
    first 15 % of the steps (or for `warmup_steps`, when given) and then falls like `cosine`. A warm-up rises
    linearly from base_lr / warmup_steps. Raises ValueError for an unknown schedule.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    rise = warmup_steps
    if schedule == "one-cycle" and not rise:
        rise = max(1, round(_ONE_CYCLE_RISE * total_steps))
    if step < rise:
        return base_lr * (step + 1) / rise
    if schedule == "constant":
        return base_lr
    done = (step - rise) / max(1, total_steps - rise)
    return base_lr * 0.5 * (1.0 + math.cos(math.pi * done))
