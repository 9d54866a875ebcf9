"""Parts of shards that are not here yet, so that a batch need not wait for whole shards.

They are kept in memory for a while and never reach the cache, which holds whole proven shards alone; who reads them
proves each sample by its header and CRC32. Whatever goes wrong here is left to the way of whole shards, with its tries
and its messages.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass

from orchestrator.data.index import Shard
from orchestrator.data.stores.remote import Remote
from orchestrator.errors import DataError

# (shard, first byte, byte after the last)
Wanted = tuple[int, int, int]

# Bytes that nobody asked for, fetched where that saves a request: some milliseconds, a request takes tens of them.
_GAP_BYTES = 256 * 2**10
# Parts are not made larger; a shard that is not larger either comes as soon in one piece.
_LARGEST_BYTES = 4 * 2**20
_MEMORY_BYTES = 128 * 2**20
# What is read in parts is read a second time with its shard. That may cost so much, and a share of the shards so far.
_FREE_BYTES = 64 * 2**20
_SHARE = 0.25


@dataclass(frozen=True, eq=False)
class _Span:
    shard: int
    start: int
    end: int
    content: Future[bytes]


class Spans:
    """Parts of the shards of one set, fetched by `threads` threads on request. Safe between threads."""

    def __init__(self, remote: Remote, shards: Sequence[Shard], threads: int = 8) -> None:
        self._remote, self._shards = remote, shards
        self._spans: dict[_Span, None] = {}  # in the order of asking
        self._of: dict[int, list[_Span]] = {}
        self._spent = 0
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="spans")

    def ask(self, wanted: Iterable[Wanted]) -> None:
        """Begin to fetch what is not asked for yet, as far as the bounds allow."""
        with self._lock:
            for shard, start, end in joined(one for one in wanted if self._is_new(one)):
                self._begin(shard, start, end)

    def take(self, one: Wanted) -> bytes | None:
        """What was asked for, waiting if need be; None where it was not, or could not be had."""
        with self._lock:
            span = self._covering(one)
        if span is None:
            return None
        try:
            content = span.content.result()
        except (DataError, CancelledError):
            return None
        return content[one[1] - span.start : one[2] - span.start]

    def forget(self, shard: int) -> None:
        """A shard is here: its parts are not needed any more."""
        with self._lock:
            for span in self._of.pop(shard, []):
                del self._spans[span]

    def stop(self) -> None:
        """What has not begun is not fetched any more."""
        with self._lock:
            for span in [span for span in self._spans if span.content.cancel()]:
                self._remove(span)

    def _remove(self, span: _Span) -> None:
        del self._spans[span]
        self._of[span.shard].remove(span)

    def _is_new(self, one: Wanted) -> bool:
        return self._shards[one[0]].bytes > _LARGEST_BYTES and self._covering(one) is None

    def _covering(self, one: Wanted) -> _Span | None:
        shard, start, end = one
        return next((span for span in self._of.get(shard, ()) if span.start <= start and end <= span.end), None)

    def _begin(self, shard: int, start: int, end: int) -> None:
        size, name = end - start, self._shards[shard].name
        whole = self._remote.counters.values()["bytes"] - self._spent
        if end > self._shards[shard].bytes or self._spent + size > _FREE_BYTES + _SHARE * whole:
            return
        self._spent += size
        span = _Span(shard, start, end, self._pool.submit(self._remote.part, name, start, end))
        self._spans[span] = None
        self._of.setdefault(shard, []).append(span)
        held = sum(span.end - span.start for span in self._spans)
        while held > _MEMORY_BYTES:
            oldest = next(iter(self._spans))
            self._remove(oldest)
            held -= oldest.end - oldest.start


def joined(wanted: Iterable[Wanted]) -> list[Wanted]:
    """Neighbours in one, also over a small gap; none of them very large by that."""
    found: list[Wanted] = []
    for shard, start, end in sorted(set(wanted)):
        if found and found[-1][0] == shard and start - found[-1][2] <= _GAP_BYTES:
            first = found[-1][1]
            if max(end, found[-1][2]) - first <= _LARGEST_BYTES:
                found[-1] = shard, first, max(end, found[-1][2])
                continue
        found.append((shard, start, end))
    return found
