"""`orchestrator data ...`: pack, verify, stats, in words."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

from orchestrator.data.index import SUFFIXES, Index, open_index
from orchestrator.data.pack import pack as pack_shards
from orchestrator.data.verify import problems
from orchestrator.errors import EXIT_DONE, DataError


class Ticker:
    """One line that is rewritten on a terminal, and one line every ten seconds elsewhere."""

    def __init__(self, verb: str, done: int = 0) -> None:
        """`done` is what was there before the clock began."""
        self._verb, self._began, self._before = verb, time.monotonic(), done
        self._next, self._over = 0.0, False
        self._live = sys.stderr.isatty()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._over or (now < self._next and done < total):
            return
        self._over = done == total
        self._next = now + (0.2 if self._live else 10.0)
        rate = max(0, done - self._before) / max(now - self._began, 1e-9)
        line = f"{self._verb} {done} of {total} images, {rate:.0f} images/s"
        end = "\n" if done == total or not self._live else "\r"
        print(line, end=end, file=sys.stderr, flush=True)

    @property
    def seconds(self) -> float:
        """Time since the clock began."""
        return time.monotonic() - self._began


def pack(source: str, out: Path) -> int:
    if (out / "index.json").is_file():
        index = open_index(out)
        if index.source != Path(source).name:
            raise DataError(
                f"{out}: holds data packed from {index.source!r} already, not from {source!r}; "
                "remove it or choose another folder"
            )
        print(f"{out} holds packed data already: {_summary(index)}. Remove the folder to pack it afresh.")
        return EXIT_DONE
    index = pack_shards(source, out, progress=Ticker("packed"))
    print(f"{out}: {_summary(index)}")
    if index.ignored:
        print(f"  {index.ignored} files of the source are no images in a class folder and were ignored")
    return EXIT_DONE


def verify(out: Path) -> int:
    index = open_index(out)
    wrong = problems(index, progress=Ticker("verified"))
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
