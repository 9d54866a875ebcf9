"""From images to WebDataset shards and their index: in several processes, going on after a kill, to the same bytes.

Every shard is planned from the list of the source before the first image is read, so that it can be written anywhere
and at any time. Finished shards wait in `.OUT.packing`, each with a note, until all are there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np

from hff.randomness import derive_seed
from orchestrator.data.index import Index, open_index, write_index
from orchestrator.data.names import write_names
from orchestrator.data.packing.labels import Labelling, class_list, named, read_labels
from orchestrator.data.packing.reencode import Encoding
from orchestrator.data.packing.shard_writer import member_bytes
from orchestrator.data.packing.shards import Recipe, Task, bad_images, read_notes, write_shard
from orchestrator.data.packing.sources import Item, opened
from orchestrator.data.parallel import results, worth
from orchestrator.errors import DataError, JobError, OrchestratorError
from orchestrator.storage import alone, write_atomically

SHARD_BYTES = 256 * 2**20
# A source of which more is bad is another one than was meant.
_MOST_BAD = 0.1
_NAMED = 20

Progress = Callable[[int, int], None]
# Calls a function with each of some tasks somewhere, at most so many at a time, and gives what comes back.
Share = Callable[[Callable[[Task], int], Sequence[Task], int | None], Iterator[int]]


class _BadImages(DataError):
    """Images that cannot be packed; what is packed stays, for who leaves them out."""


def pack(
    source: str | Path,
    out: Path,
    *,
    labelling: Labelling | None = None,
    encoding: Encoding | None = None,
    shard_bytes: int = SHARD_BYTES,
    jobs: int | None = 1,
    skip_bad: bool = False,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda line: None,
    share: Share | None = None,
) -> Index:
    """Write shards and index of `source` into the folder `out`, which must be empty or absent.

    The result is a function of the images and the options alone, byte for byte, whatever `jobs` is (None: as many
    processes as are worth it) and however often it was killed: classes are the sorted names, samples are shuffled
    with a fixed seed, times and owners are zero. A shard ends with the image that brings it to `shard_bytes`
    (counted before encoding anew). `share` has them written elsewhere. The folder appears when it is complete.
    `skip_bad` leaves out up to a tenth of the images where they cannot be packed, and states them in the index.
    Raises DataError for a source that cannot be packed, with all of its bad images, or an `out` that holds something
    else, JobError for an `out` without a name or where nothing can be written.
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
            _pack(recipe, jobs, progress, say, share, skip_bad=skip_bad)
        except _BadImages:
            raise
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
    """Try it: what may be written cannot be told from the rights of a folder, for root least of all."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=parent):
            return
    except (FileExistsError, NotADirectoryError):
        why = "a part of its path is a file"
    except OSError as error:
        why = error.strerror or str(error)
    raise JobError(f"{out}: cannot be written: {why}; choose another OUT")


def _pack(
    recipe: Recipe,
    jobs: int | None,
    progress: Progress | None,
    say: Callable[[str], None],
    share: Share | None,
    *,
    skip_bad: bool,
) -> None:
    """Write what is missing of shards and index."""
    labels = read_labels(recipe.labelling)
    recipe.work.mkdir(exist_ok=True)
    with opened(recipe.source, recipe.work, labels.per_image) as found:
        classes = class_list((item.label for item in found.items), labels, str(recipe.source), recipe.labelling)
        tasks = _planned(recipe, found.items, classes)
        _begin(recipe, _plan_hash(tasks, classes, found.stamp))
        total = len(found.items)
        missing = [task for task in tasks if not task.is_whole()]
        done = total - sum(len(task.items) for task in missing)
        if done:
            say(f"{len(tasks) - len(missing)} of {len(tasks)} shards are there already")
        if progress is not None:
            progress(done, total)
        if jobs is None and share is None:
            size = sum(item.size for task in missing for item in task.items)
            jobs = worth(size, heavy=recipe.encoding.is_asked)
        _write(missing, done, total, jobs, progress, share or results)
    bad = bad_images(tasks)
    if bad and (not skip_bad or len(bad) > _MOST_BAD * total):
        raise _BadImages(_refusal(recipe, bad, total, skip_bad=skip_bad))
    shards, rows = read_notes(tasks)
    emptied = sorted({label for task in tasks for label in task.labels} - set(rows["label"].tolist()))
    if emptied:
        raise _BadImages(
            f"{recipe.source}: --skip-bad leaves no image of class {classes[emptied[0]]}; remove the class"
        )
    write_names(recipe.shards, ((task.key(i), item.name) for task in tasks for i, item in enumerate(task.items)))
    write_index(
        recipe.shards,
        classes,
        shards,
        rows,
        recipe.name,
        found.ignored,
        extra=named(classes, labels.names),
        options=stated_options(recipe.encoding, recipe.shard_bytes),
        left_out=bad,
    )


def _refusal(recipe: Recipe, bad: Mapping[str, str], total: int, *, skip_bad: bool) -> str:
    """All images that cannot be packed in one message, so that one round of repairs is enough."""
    remedy = "repair or remove them"
    if skip_bad:
        remedy += f"; --skip-bad leaves out at most {100 * _MOST_BAD:.0f} % of a source"
    elif len(bad) <= _MOST_BAD * total:
        remedy += ", or leave them out: the same command with --skip-bad goes on from here"
    return "\n".join([f"{recipe.source}: {len(bad)} of {total} images cannot be packed:", *told(bad), remedy])


def told(bad: Mapping[str, str]) -> list[str]:
    """Bad images and their faults, a line each; of very many the first ones and a count."""
    lines = [f"  {place}: {why}" for place, why in bad.items()]
    return lines if len(lines) <= _NAMED else [*lines[:_NAMED], f"  ... and {len(lines) - _NAMED} more"]


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


def _publish(shards: Path, out: Path) -> None:
    """Put the finished folder in its place."""
    try:
        if out.exists():
            out.rmdir()
        os.rename(shards, out)
    except OSError as error:
        raise DataError(f"{out}: the shards cannot be put there: {error.strerror}") from None
