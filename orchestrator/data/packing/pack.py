"""From images to WebDataset shards and their index: in several processes, going on after a kill, to the same bytes.

Every shard is planned from the list of the source before the first image is read, so that it can be written anywhere
and at any time. Finished shards wait in `.OUT.packing`, each with a note, until all are there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from hff.randomness import derive_seed
from orchestrator.data.images.decode import BadImage, suffix_of
from orchestrator.data.index import SUFFIXES, Index, Rows, Shard, member_dtype, open_index, write_index
from orchestrator.data.packing.labels import Labelling, class_list, named, read_labels
from orchestrator.data.packing.reencode import Encoding, encoded
from orchestrator.data.packing.shard_writer import ShardWriter, member_bytes
from orchestrator.data.packing.sources import Item, opened, read_item
from orchestrator.data.parallel import results, worth
from orchestrator.errors import DataError, JobError, OrchestratorError
from orchestrator.storage import alone, write_atomically

SHARD_BYTES = 256 * 2**20
_KEY_DIGITS = 9

Progress = Callable[[int, int], None]
# Calls a function with each of some tasks somewhere, at most so many at a time, and gives what comes back.
Share = Callable[[Callable[["Task"], int], Sequence["Task"], int | None], Iterator[int]]


@dataclass(frozen=True)
class Recipe:
    """What is packed, how, and where shards wait until all are there."""

    source: str | Path
    work: Path
    labelling: Labelling
    encoding: Encoding
    shard_bytes: int

    @property
    def name(self) -> str:
        """The last part of the source's path."""
        return Path(self.source).name

    @property
    def shards(self) -> Path:
        """The folder that becomes the packed set."""
        return self.work / "shards"


@dataclass(frozen=True)
class Task:
    """One shard: its number, the number of its first image, its images in order with their class numbers."""

    recipe: Recipe
    number: int
    first: int
    items: Sequence[Item]
    labels: Sequence[int]

    @property
    def path(self) -> Path:
        return self.recipe.shards / f"shard-{self.number:06d}.tar"

    @property
    def note(self) -> Path:
        """Written last: what the finished shard holds."""
        return self.recipe.work / f"{self.path.name}.json"


def pack(
    source: str | Path,
    out: Path,
    *,
    labelling: Labelling | None = None,
    encoding: Encoding | None = None,
    shard_bytes: int = SHARD_BYTES,
    jobs: int | None = 1,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda line: None,
    share: Share | None = None,
) -> Index:
    """Write shards and index of `source` into the folder `out`, which must be empty or absent.

    The result is a function of the images and the options alone, byte for byte, whatever `jobs` is (None: as many
    processes as are worth it) and however often it was killed: classes are the sorted names, samples are shuffled
    with a fixed seed, times and owners are zero. A shard ends with the image that brings it to `shard_bytes`
    (counted before encoding anew). `share` has them written elsewhere. The folder appears when it is complete.
    Raises DataError for a source that cannot be packed whole or an `out` that holds something else, JobError for an
    `out` without a name or where nothing can be written.
    """
    out = Path(out)
    if out.name in ("", ".."):
        raise JobError(f"{out}: must be a folder with a name of its own, which it gets when it is complete")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: is there already and not empty; remove it or choose another folder")
    work = out.with_name(f".{out.name}.packing")
    _refuse_unwritable(work.parent, out)
    recipe = Recipe(source, work, labelling or Labelling(), encoding or Encoding(), shard_bytes)
    with alone(work.with_suffix(".lock"), lambda: False, lambda: say(f"{out}: is being packed already; waiting")):
        if (out / "index.json").is_file():
            index = open_index(out)
            if index.source == recipe.name:
                return index
        try:
            _pack(recipe, jobs, progress, say, share)
        except DataError:
            shutil.rmtree(work, ignore_errors=True)  # whoever repairs the source changes it
            raise
        except OSError as error:
            raise OrchestratorError(
                f"{work}: cannot be written: {error}; make room there, then the same command goes on"
            ) from None
        _publish(recipe.shards, out)
        shutil.rmtree(work)
    return open_index(out)


def stated_options(encoding: Encoding, shard_bytes: int) -> dict[str, int]:
    """The options of packing that are not the usual ones, as the index keeps them."""
    asked = {"--max-side": encoding.max_side, "--quality": encoding.quality}
    asked["--shard-size"] = None if shard_bytes == SHARD_BYTES else shard_bytes // 2**20
    return {flag: number for flag, number in asked.items() if number is not None}


def _refuse_unwritable(parent: Path, out: Path) -> None:
    try:
        parent.mkdir(parents=True, exist_ok=True)
        why = "" if os.access(parent, os.W_OK | os.X_OK) else f"{parent} is read-only"
    except OSError as error:
        why = str(error)
    if why:
        raise JobError(f"OUT: must be a folder that can be written, got {out}: {why}")


def _pack(
    recipe: Recipe, jobs: int | None, progress: Progress | None, say: Callable[[str], None], share: Share | None
) -> None:
    """Write what is missing of shards and index."""
    labels = read_labels(recipe.labelling)
    recipe.work.mkdir(exist_ok=True)
    with opened(recipe.source, recipe.work, labels.per_image) as found:
        classes = class_list((item.label for item in found.items), labels, str(recipe.source), recipe.labelling)
        tasks = _planned(recipe, found.items, classes)
        _begin(recipe, _plan_hash(tasks, classes, found.stamp))
        total = len(found.items)
        missing = [task for task in tasks if not _is_whole(task)]
        done = total - sum(len(task.items) for task in missing)
        if done:
            say(f"{len(tasks) - len(missing)} of {len(tasks)} shards are there already")
        if progress is not None:
            progress(done, total)
        if jobs is None and share is None:
            size = sum(item.size for task in missing for item in task.items)
            jobs = worth(size, heavy=recipe.encoding.is_asked)
        _write(missing, done, total, jobs, progress, share or results)
        shards, rows = _read_notes(tasks)
    extra = named(classes, labels.names)
    options = stated_options(recipe.encoding, recipe.shard_bytes)
    write_index(recipe.shards, classes, shards, rows, recipe.name, found.ignored, extra=extra, options=options)


def _write(
    missing: Sequence[Task], done: int, total: int, jobs: int | None, progress: Progress | None, share: Share
) -> None:
    """Write shards; progress is told by image in this process, by shard where others write them."""

    def tick() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    if not missing:
        return
    if share is results and min(jobs or 1, len(missing)) <= 1:
        for task in missing:
            write_shard(task, tick)
        return
    for written in share(write_shard, missing, jobs and min(jobs, len(missing))):
        done += written
        if progress is not None:
            progress(done, total)


def _planned(recipe: Recipe, items: Sequence[Item], classes: Sequence[str]) -> list[Task]:
    """Which image goes where: a permutation with a fixed seed, cut where a shard is full."""
    numbers = {label: i for i, label in enumerate(classes)}
    random = np.random.Generator(np.random.PCG64(derive_seed(0, "pack")))
    order = random.permutation(len(items)).tolist()
    tasks: list[Task] = []
    first = size = 0
    for i, chosen in enumerate(order, start=1):
        size += member_bytes(items[chosen].size) + member_bytes(1)
        if size >= recipe.shard_bytes or i == len(order):
            own = [items[k] for k in order[first:i]]
            tasks.append(Task(recipe, len(tasks), first, own, [numbers[item.label] for item in own]))
            first, size = i, 0
    return tasks


def _plan_hash(tasks: Sequence[Task], classes: Sequence[str], stamp: tuple[int, int]) -> str:
    """What decides the bytes of all shards. Shards of another plan are of no use."""
    digest = hashlib.sha256(json.dumps([list(classes), stamp, tasks[0].recipe.encoding.name]).encode())
    for task in tasks:
        for item, label in zip(task.items, task.labels, strict=True):
            digest.update(f"{task.number}\0{label}\0{item.name}\0{item.offset}\0{item.size}\n".encode(errors="replace"))
    return digest.hexdigest()


def _begin(recipe: Recipe, plan: str) -> None:
    """Keep finished shards of this plan, remove those of another one and everything half written."""
    stated = recipe.work / "plan"
    if not stated.is_file() or stated.read_text(encoding="utf-8") != plan:
        for note in recipe.work.glob("*.json"):
            note.unlink()
        shutil.rmtree(recipe.shards, ignore_errors=True)
        recipe.shards.mkdir()
        write_atomically(stated, plan)
    for temporary in recipe.work.glob(".*.tmp"):
        temporary.unlink()
    for path in recipe.shards.iterdir():
        if not (recipe.work / f"{path.name}.json").is_file():
            path.unlink()


def _is_whole(task: Task) -> bool:
    """Whether a shard was finished: its bytes were on the disk before the note was."""
    try:
        stated = json.loads(task.note.read_text(encoding="utf-8"))["shard"]["bytes"]
        return bool(task.path.stat().st_size == stated)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write_shard(task: Task, tick: Callable[[], None] = lambda: None) -> int:
    """Write one shard under a name of its own, then give it its name, then its note. Returns its images."""
    rows = np.zeros(len(task.items), dtype=member_dtype(_KEY_DIGITS))
    temporary = task.path.with_name(f".{task.path.name}.{os.getpid()}.tmp")
    writer = ShardWriter(temporary)
    try:
        for i, (item, label) in enumerate(zip(task.items, task.labels, strict=True)):
            suffix, data = _image(item, task)
            key = f"{task.first + i:0{_KEY_DIGITS}d}"
            offset = writer.add(f"{key}.{suffix}", data)
            writer.add(f"{key}.cls", str(label).encode())
            place = (key.encode(), task.number, offset, len(data))
            rows[i] = (*place, zlib.crc32(data), label, SUFFIXES.index(suffix))
            writer.samples += 1
            tick()
        shard = replace(writer.finish(), name=task.path.name)
        os.replace(temporary, task.path)
    finally:
        writer.close()
        temporary.unlink(missing_ok=True)
    write_atomically(task.note, json.dumps({"shard": asdict(shard), "rows": rows.tobytes().hex()}))
    return len(rows)


def _image(item: Item, task: Task) -> tuple[str, bytes]:
    """Suffix and bytes of an image as it is packed."""
    data = read_item(item)
    suffix = suffix_of(data)
    if suffix is None:
        raise DataError(f"{task.recipe.name}: {item.name}: neither JPEG nor PNG by its first bytes; remove it")
    if task.recipe.encoding.is_asked:
        try:
            data = encoded(data, suffix, task.recipe.encoding)
        except BadImage as error:
            raise DataError(f"{task.recipe.name}: {item.name}: {error}; remove it") from None
    return suffix, data


def _read_notes(tasks: Sequence[Task]) -> tuple[list[Shard], Rows]:
    shards, rows = [], np.zeros(sum(len(task.items) for task in tasks), dtype=member_dtype(_KEY_DIGITS))
    for task in tasks:
        note = json.loads(task.note.read_text(encoding="utf-8"))
        shards.append(Shard(**note["shard"]))
        rows[task.first : task.first + len(task.items)] = np.frombuffer(bytes.fromhex(note["rows"]), dtype=rows.dtype)
    return shards, rows


def _publish(shards: Path, out: Path) -> None:
    """Put the finished folder in its place."""
    try:
        if out.exists():
            out.rmdir()
        os.rename(shards, out)
    except OSError as error:
        raise DataError(f"{out}: the shards cannot be put there: {error.strerror}") from None
