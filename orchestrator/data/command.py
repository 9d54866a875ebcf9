"""`orchestrator data ...`: pack, verify, stats, in words."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from orchestrator.data.index import SUFFIXES, Index, open_index
from orchestrator.data.labels import Labelling
from orchestrator.data.pack import SHARD_BYTES
from orchestrator.data.pack import pack as pack_shards
from orchestrator.data.parallel import cores
from orchestrator.data.reencode import Encoding
from orchestrator.data.verify import problems
from orchestrator.errors import EXIT_DONE, DataError, Interrupted


class Ticker:
    """One line that is rewritten on a terminal, and one line every ten seconds elsewhere."""

    def __init__(self, verb: str, done: int | None = None) -> None:
        """`done` is what was there before the clock began; without it the first call tells, and starts the clock."""
        self._verb, self._began, self._before = verb, time.monotonic(), done
        self._next, self._over = 0.0, False
        self._live = sys.stderr.isatty()
        self._every_s = 0.2 if self._live else 10.0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._before is None:
            self._before, self._began, self._next = done, now, now + self._every_s
            return
        if self._over or (now < self._next and done < total):
            return
        self._over = done == total
        self._next = now + self._every_s
        rate = max(0, done - self._before) / max(now - self._began, 1e-9)
        line = f"{self._verb} {done} of {total} images, {rate:.0f} images/s{_left((total - done) / (rate or 1))}"
        end = "\n" if done == total or not self._live else "\x1b[K\r"
        print(line, end=end, file=sys.stderr, flush=True)

    def speed(self, total: int, jobs: int) -> str:
        """What was done since the clock began, in words."""
        done, seconds = total - (self._before or 0), self.seconds
        return f"{done} in {seconds:.1f} s, {done / seconds / jobs:.0f} images/s for each of {jobs} processes"

    @property
    def seconds(self) -> float:
        """Time since the clock began."""
        return time.monotonic() - self._began


def _left(seconds: float) -> str:
    if seconds < 1:
        return ""
    return f", {seconds / 60:.0f} min left" if seconds >= 90 else f", {seconds:.0f} s left"


def pack(
    source: str,
    out: Path,
    *,
    labelling: Labelling | None = None,
    encoding: Encoding | None = None,
    shard_bytes: int = SHARD_BYTES,
    jobs: int | None = None,
) -> int:
    if (out / "index.json").is_file():
        index = open_index(out)
        if index.source != Path(source).name:
            raise DataError(
                f"{out}: holds data packed from {index.source!r} already, not from {source!r}; "
                "remove it or choose another folder"
            )
        print(f"{out} holds packed data already: {_summary(index)}. Remove the folder to pack it afresh.")
        return EXIT_DONE
    jobs, ticker = jobs or cores(), Ticker("packed")
    with _stoppable(f"packing {out}"):
        index = pack_shards(
            source,
            out,
            labelling=labelling,
            encoding=encoding,
            shard_bytes=shard_bytes,
            jobs=jobs,
            progress=ticker,
            say=_say,
        )
    print(f"{out}: {_summary(index)}; {ticker.speed(index.num_samples, jobs)}")
    if index.ignored:
        print(f"  {index.ignored} files of the source are no images in a class folder and were ignored")
    return EXIT_DONE


@contextmanager
def _stoppable(doing: str) -> Iterator[None]:
    """Ctrl-C is no accident: what is there is kept."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(f"{doing} was interrupted; the same command goes on from here") from None


def _say(line: str) -> None:
    print(line, flush=True)


def verify(out: Path) -> int:
    index = open_index(out)
    wrong = problems(index, progress=Ticker("verified", done=0))
    if wrong:
        raise DataError(f"{out}: {len(wrong)} problems:\n  " + "\n  ".join(wrong[:50]))
    print(f"{out}: all hashes, keys, labels and images are right: {_summary(index)}")
    return EXIT_DONE


def stats(out: Path) -> int:
    index = open_index(out)
    lengths = index.members["length"].astype(np.int64)
    per_class = np.bincount(index.labels, minlength=len(index.classes))
    suffixes = np.bincount(index.members["suffix"], minlength=len(SUFFIXES))
    print(f"{out}: {_summary(index)}")
    print(f"  identity        {index.sha256}")
    print(f"  bytes per image {lengths.mean():.0f} mean, {lengths.min()} to {lengths.max()}")
    print("  formats         " + ", ".join(f"{n} {s}" for n, s in zip(suffixes, SUFFIXES, strict=True) if n))
    print(f"  per class       {per_class.min()} to {per_class.max()} images")
    for name, count in list(zip(index.classes, per_class, strict=True))[:20]:
        print(f"    {name:<20} {count}")
    if len(index.classes) > 20:
        print(f"    ... and {len(index.classes) - 20} more")
    return EXIT_DONE


def _summary(index: Index) -> str:
    size = sum(shard.bytes for shard in index.shards)
    return f"{index.num_samples} images, {len(index.classes)} classes, {len(index.shards)} shards, {size / 1e6:.1f} MB"
