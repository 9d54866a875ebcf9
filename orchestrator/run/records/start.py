"""Where the time from the command to the first training step goes."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress


def process_began() -> float:
    """When this process was started, before interpreter and imports, on the clock of time.monotonic().

    Where the system does not tell: now.
    """
    age = 0.0
    with suppress(OSError, ValueError, AttributeError):
        with open("/proc/self/stat", encoding="utf-8") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - age


@contextmanager
def without_collector() -> Iterator[None]:
    """Around imports: what they make stays, and looking through it for garbage takes a fifth of their time."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


class StartClock:
    """Seconds by what they went into. The driver's go with the assignment, and rank 0 counts on from there."""

    def __init__(self, began: float | None = None, earlier: Mapping[str, float] | None = None) -> None:
        """`began` is on the clock of time.monotonic(); `earlier` are the seconds before."""
        self.seconds = dict(earlier or {})
        self._last = time.monotonic() if began is None else began

    def mark(self, part: str) -> None:
        """Everything since the mark before went into this."""
        now = time.monotonic()
        self.seconds[part] = self.seconds.get(part, 0.0) + max(0.0, now - self._last)
        self._last = now

    def total(self) -> float:
        """Seconds up to now."""
        return sum(self.seconds.values()) + time.monotonic() - self._last


def on_worker(before: Mapping[str, float], launched: float) -> StartClock:
    """The clock of a worker that begins now; `launched` is when the driver launched it, by time.time().

    Two machines' clocks differ; a launch that seems to be in the future was now.
    """
    clock = StartClock(time.monotonic() - max(0.0, time.time() - launched), before)
    clock.mark("workers")
    return clock
