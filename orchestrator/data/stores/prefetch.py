"""Fetch shards before they are needed: the order is known, so what the next seconds need is known too."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.index import HEADER_BYTES, Index
from orchestrator.data.stores.remote import Stopped
from orchestrator.data.stores.remote_index import RemoteShards
from orchestrator.data.stores.spans import Wanted
from orchestrator.errors import DataError

Indices = NDArray[np.int64]

_LEAST_BATCHES = 4
_RATE_BATCHES = 32
_WAKE_S = 0.5
# Whole shards leave the line to the first batch for so long at most.
_HEAD_START_S = 0.5
# Of so many batches and bytes ahead, what is not here is fetched in parts too; asked for together, since neighbours in
# a shard are wanted by neighbouring batches.
_NEAR_BATCHES = 2
_NEAR_BYTES = 32 * 2**20
_TOGETHER_BYTES = 8 * 2**20


class Horizon:
    """Which batches are near enough to fetch their shards: those of the next `seconds` at the rate of late.

    Before there is a rate, and when it is very low, the next few batches. Never more than half of the cache, or what
    is fetched early would push out what is needed sooner.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._times: deque[float] = deque(maxlen=_RATE_BATCHES)

    def consumed(self, now: float) -> None:
        """A batch was handed out at `now` seconds."""
        self._times.append(now)

    def batches(self, now: float) -> int:
        """How many batches ahead to look at `now`."""
        if len(self._times) < 2:
            return _LEAST_BATCHES
        rate = (len(self._times) - 1) / max(now - self._times[0], 1e-6)
        return max(_LEAST_BATCHES, int(rate * self._seconds) + 1)


@contextmanager
def foreseen(index: Index, plan: Iterator[Indices], *, parts: bool = True) -> Iterator[Callable[[], None]]:
    """While the block lasts, what the batches of `plan` need is fetched ahead of the calls of what it gives.

    With `parts` near batches need not wait for whole shards; they must be read by this process.
    """
    if index.store is None:
        yield lambda: None
        return
    with Prefetcher(index, plan, parts=parts) as prefetcher:
        yield prefetcher.advance


class Prefetcher:
    """Fetches the shards of the batches of `plan` ahead of `advance`, in threads, from `with` to its end."""

    def __init__(
        self, index: Index, plan: Iterator[Indices], *, seconds: float = 30.0, threads: int = 6, parts: bool = True
    ) -> None:
        assert isinstance(index.store, RemoteShards)
        self._shards: RemoteShards = index.store
        self._members: NDArray[Any] = index.members
        self._plan, self._parts = plan, parts
        self._plan_ended = False
        self._wanted: list[Wanted] = []
        self._horizon = Horizon(seconds)
        self._most_bytes = self._shards.cache.max_bytes // 2
        self._window: deque[list[int]] = deque()
        self._looked = self._handed = 0  # batches of the plan that were seen here, and that the loader gave out
        self._needed: Counter[int] = Counter()
        self._queue: deque[int] = deque()
        self._asked: set[int] = set()
        self._change = threading.Condition()
        self._stop, self._begun = threading.Event(), threading.Event()
        self._threads = [threading.Thread(target=self._look, name="prefetch", daemon=True)]
        self._threads += [threading.Thread(target=self._fetch, name="prefetch", daemon=True) for _ in range(threads)]

    def __enter__(self) -> Prefetcher:
        if self._parts:  # before anybody reads: who finds no part asked for brings the whole shard
            while self._look_on():
                pass
            self._ask()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._begun.set()
        if self._shards.spans is not None:
            self._shards.spans.stop()
        with self._change:
            self._change.notify_all()

    def advance(self) -> None:
        """The next batch of the plan was handed out."""
        self._begun.set()
        with self._change:
            self._horizon.consumed(time.monotonic())
            self._handed += 1
            if self._window:
                self._needed.subtract(self._window.popleft())
                self._needed += Counter()
            self._change.notify_all()

    def _look(self) -> None:
        """Keep the window as long as the horizon."""
        while not self._stop.is_set():
            if self._look_on():
                continue
            self._ask()
            if self._plan_ended:
                return
            with self._change:
                self._change.wait(_WAKE_S)

    def _look_on(self) -> bool:
        """Take one batch more into the window; False when it is as long as the horizon."""
        with self._change:
            wanted = self._horizon.batches(time.monotonic())
        if len(self._window) >= wanted or self._bytes() >= self._most_bytes:
            return False
        batch = next(self._plan, None)
        if batch is None:
            self._plan_ended = True
            return False
        self._take(batch)
        return True

    def _ask(self) -> None:
        """Have what is wanted of shards that are not here fetched in parts."""
        if self._wanted:
            self._shards.ask_early(self._wanted)
            self._wanted = []

    def _take(self, batch: Indices) -> None:
        """Add a batch to the window and queue those of its shards that are not here; not if it is over already."""
        self._looked += 1
        if self._looked <= self._handed:
            return
        rows = self._members[batch]
        numbers, first = np.unique(rows["shard"], return_index=True)
        shards = [int(number) for number in numbers[np.argsort(first)] if number < len(self._shards.shards)]
        missing = [shard for shard in shards if not self._shards.cache.touch(self._shards.shards[shard])]
        with self._change:
            self._window.append(shards)
            self._needed.update(shards)
            self._queue.extend(shard for shard in missing if shard not in self._asked)
            self._asked.update(missing)
            ahead = self._looked - self._handed
            self._change.notify_all()
        if self._parts and ahead <= max(_NEAR_BATCHES, _NEAR_BYTES // max(1, int(rows["length"].sum()))):
            self._want(rows[np.isin(rows["shard"], missing)])

    def _want(self, rows: NDArray[Any]) -> None:
        for shard, offset, length in zip(*(rows[name].tolist() for name in ("shard", "offset", "length")), strict=True):
            self._wanted.append((shard, offset - HEADER_BYTES, offset + length))
        if sum(end - start for _, start, end in self._wanted) > _TOGETHER_BYTES:
            self._ask()

    def _bytes(self) -> int:
        with self._change:
            return sum(self._shards.shards[shard].bytes for shard in self._needed)

    def _fetch(self) -> None:
        self._begun.wait(_HEAD_START_S if self._parts else 0)
        while not self._stop.is_set():
            with self._change:
                if not self._queue:
                    self._change.wait(_WAKE_S)
                    continue
                shard = self._queue.popleft()
            try:
                self._shards.cache.fetch(self._shards.remote, self._shards.shards[shard], self._stop, wait=False)
            except Stopped:
                return
            except DataError:
                pass  # whoever needs the shard asks for it again, and tells
            finally:
                with self._change:
                    self._asked.discard(shard)
