"""`orchestrator data ...`: pack, verify, stats, in words."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.data.describe import describe
from orchestrator.data.index import Index, open_index
from orchestrator.data.packing.in_place import index_in_place
from orchestrator.data.packing.labels import Labelling, some
from orchestrator.data.packing.pack import SHARD_BYTES, Share, stated_options, told
from orchestrator.data.packing.pack import pack as pack_shards
from orchestrator.data.packing.reencode import Encoding
from orchestrator.data.packing.upload import pack_into_store
from orchestrator.data.parallel import worth
from orchestrator.data.quarantine import FILE, read_reasons, write_quarantine
from orchestrator.data.stores.remote_index import open_data
from orchestrator.data.verify import left_out, problems
from orchestrator.errors import EXIT_DONE, DataError, Interrupted, JobError
from orchestrator.job import paths
from orchestrator.job.show import counted

_SHOWN = 50


class Ticker:
    """One line that is rewritten on a terminal, and one line every ten seconds elsewhere."""

    def __init__(self, verb: str, done: int | None = None, unit: str = "images") -> None:
        """`done` is what was there before the clock began; without it the first call tells, and starts the clock."""
        self._verb, self._began, self._before = verb, time.monotonic(), done
        self._done = done or 0
        self._unit, self._next, self._over = unit, 0.0, False
        self._live = sys.stderr.isatty()
        self._every_s = 0.2 if self._live else 10.0

    def __call__(self, done: int, total: int) -> None:
        now, self._done = time.monotonic(), done
        if self._before is None:
            self._before, self._began, self._next = done, now, now + self._every_s
            return
        if self._over or (now < self._next and done < total):
            return
        self._over = done == total
        self._next = now + self._every_s
        rate = max(0, done - self._before) / max(now - self._began, 1e-9)
        left = _left((total - done) / (rate or 1))
        line = f"{self._verb} {done} of {total} {self._unit}, {rate:.0f} {self._unit}/s{left}"
        end = "\n" if done == total or not self._live else "\x1b[K\r"
        print(line, end=end, file=sys.stderr, flush=True)

    def speed(self) -> str:
        """What was done since the clock began, in words."""
        done, seconds = self._done - (self._before or 0), self.seconds
        if not done:
            return f"no {self._unit} left to be {self._verb}"
        return f"{done} {self._verb} in {seconds:.1f} s, {done / seconds:.0f} {self._unit}/s"

    @property
    def seconds(self) -> float:
        """Time since the clock began."""
        return time.monotonic() - self._began


def _left(seconds: float) -> str:
    if seconds < 1:
        return ""
    return f", {seconds / 60:.0f} min left" if seconds >= 90 else f", {seconds:.0f} s left"


def pack_anywhere(source: str, out: str, **options: Any) -> int:
    """Pack into a folder or, by way of one, into a store; `options` are those of `pack`."""
    if not paths.is_store(out):
        return pack(source, Path(out), **options)
    with _stoppable(f"packing {out}"):
        ticker = Ticker("uploaded", unit="files")
        return pack_into_store(source, out, lambda folder: pack(source, folder, **options), ticker, _say)


def pack(
    source: str,
    out: Path,
    *,
    labelling: Labelling | None = None,
    encoding: Encoding | None = None,
    shard_bytes: int = SHARD_BYTES,
    jobs: int | None = None,
    skip_bad: bool = False,
    share: Share | None = None,
) -> int:
    """Pack into a folder and say how it went; returns the exit code. Raises DataError, JobError, Interrupted."""
    if (out / "index.json").is_file():
        index = open_index(out)
        _refuse_other(index, source, labelling, stated_options(encoding or Encoding(), shard_bytes))
        print(f"{out} holds packed data already: {_summary(index)}. Remove the folder to pack it afresh.")
        return EXIT_DONE
    ticker = Ticker("read")
    with _stoppable(f"packing {out}"):
        index = pack_shards(
            source,
            out,
            labelling=labelling,
            encoding=encoding,
            shard_bytes=shard_bytes,
            jobs=jobs,
            skip_bad=skip_bad,
            progress=ticker,
            say=_say,
            share=share,
        )
    print(f"{out}: {_summary(index)}; {ticker.speed()}; classes: {some(index.classes)}")
    _tell_empty(index)
    if index.ignored:
        print(f"  ignored: {counted(index.ignored, 'file')} of the source, no images in a class folder")
    if index.left_out:
        print(f"  left out: {_left_out(index)}")
    return EXIT_DONE


def _tell_empty(index: Index) -> None:
    """Name the classes that came from another set and have no image in this one."""
    counts = np.bincount(index.labels, minlength=len(index.classes)).tolist()
    empty = [label for label, count in zip(index.classes, counts, strict=True) if not count]
    if empty:
        print(f"  no images of {_classes(len(empty))}: {some(empty)}")


def _left_out(index: Index) -> str:
    """How many images of the source are not there, which and why."""
    head = f"{counted(len(index.left_out), 'image')} of the source that cannot be packed (all of them: index.json)"
    return "\n  ".join([head, *told(index.left_out)])


def _refuse_other(index: Index, source: str, labelling: Labelling | None, options: Mapping[str, int]) -> None:
    """Raise JobError where what lies there was packed from another source or with other options than are given."""
    found = ""
    if index.source != Path(source).name:
        found = f"from {index.source!r} already, not from {source!r}"
    elif labelling and labelling.classes and open_index(labelling.classes).classes != index.classes:
        found = f"already, not with the classes of {labelling.classes}"
    for flag, number in options.items():
        if index.options.get(flag) != number:
            found = found or f"already, {flag} {index.options.get(flag, 'not given')}, not {number}"
    if found:
        raise JobError(f"{index.folder}: holds data packed {found}; remove it or choose another folder")


@contextmanager
def _stoppable(doing: str) -> Iterator[None]:
    """Ctrl-C is no accident: what is there is kept."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(f"{doing} was interrupted; the same command goes on from here") from None


def _say(line: str) -> None:
    print(line, flush=True)


def index(folder: Path, *, labelling: Labelling | None = None, jobs: int | None = None) -> int:
    """Write the index of shards that another program wrote."""
    ticker = Ticker("indexed", unit="shards")
    jobs = jobs or worth(sum(path.stat().st_size for path in folder.glob("*.tar")), heavy=False)
    with _stoppable(f"indexing {folder}"):
        made = index_in_place(folder, labelling=labelling, jobs=jobs, progress=ticker)
    print(f"{folder}: {_summary(made)}; read once in {ticker.seconds:.1f} s, the shards stay as they are")
    _tell_empty(made)
    return EXIT_DONE


def verify(out: str, *, decode: bool = False, fix: bool = False, jobs: int | None = None) -> int:
    """Check a set against its index; returns the exit code. Raises DataError with all that is wrong.

    `fix` names bad samples in the list that training leaves out. Raises JobError where no list can be kept.
    """
    index = open_data(out)
    if fix and index.store is not None:
        raise JobError(f"--fix: the list is kept beside the index; verify the folder that was copied to {out}")
    known = read_reasons(index)
    with _stoppable(f"verifying {out}"):
        jobs = jobs or worth(sum(shard.bytes for shard in index.shards), heavy=decode)
        wrong = problems(index, decode=decode, jobs=jobs, progress=Ticker("verified"))
    reasons, rest = left_out(wrong)
    new = {key: why for key, why in reasons.items() if key not in known}
    if fix and new:
        write_quarantine(index, known | new)
        print("\n".join(new.values()))
        print(f"{out}: {len(new)} of {index.num_samples} samples were named in {FILE}: training leaves them out")
        print("Evaluation (data.val, data.test) leaves none out: pack those data again without these images.")
        known, new = known | new, {}
    lines = [problem.text for problem in wrong if problem.key not in known] if new else [p.text for p in rest]
    if lines:
        shown = "\n  ".join(lines[:_SHOWN])
        more = f"\n  ... and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
        remedy = f"\n{counted(len(new), 'sample')} can be left out of training: add --fix" if new else ""
        raise DataError(f"{out}: {counted(len(lines), 'problem')}:\n  {shown}{more}{remedy}")
    what = "hashes, keys, labels and images" if decode else "hashes, keys and labels"
    beside = f" but for {counted(len(known), 'sample')} in quarantine" if known else ""
    print(f"{out}: all {what} are right{beside}: {_summary(index)}")
    return EXIT_DONE


def stats(out: str) -> int:
    """Say what a set holds; returns the exit code. Raises DataError."""
    index = open_data(out)
    found = describe(index)
    low, mean, high = found.bytes
    of = "all" if found.looked_at == found.samples else f"{found.looked_at} drawn evenly"
    counts = found.per_class.values()
    print(f"{out}: {_summary(index)}")
    print(f"  identity        {index.sha256}")
    print(f"  bytes per image {mean:.0f} mean, {low} to {high}")
    print(f"  formats         {_counts(found.suffixes)}")
    print(f"  modes           {_counts(found.modes)} (of {of})")
    if found.widths:
        print(f"  width           {_spread(found.widths)}\n  height          {_spread(found.heights)}")
    if found.bad:
        print(f"  not to be opened {found.bad} of {found.looked_at}; see: orchestrator data verify --decode")
    if index.left_out:
        print(f"  left out        {_left_out(index)}")
    print(f"  per class       {min(counts)} to {max(counts)} images ({found.imbalance:.2f} : 1)")
    for name, count in list(found.per_class.items())[:20]:
        print(f"    {name:<20} {count:<8} {index.class_names.get(name, '')}".rstrip())
    if len(index.classes) > 20:
        print(f"    ... and {len(index.classes) - 20} more")
    return EXIT_DONE


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {what}" for what, count in counts.items())


def _spread(values: Sequence[int]) -> str:
    return f"{np.median(values):.0f} median, {min(values)} to {max(values)}"


def _summary(index: Index) -> str:
    size = sum(shard.bytes for shard in index.shards)
    images, shards = counted(index.num_samples, "image"), counted(len(index.shards), "shard")
    return f"{images}, {_classes(len(index.classes))}, {shards}, {size / 1e6:.1f} MB"


def _classes(number: int) -> str:
    return "1 class" if number == 1 else f"{number} classes"
