"""Batches in order, exactly once, made ahead in threads: of whatever a `Source` gives."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from orchestrator.data.images.mixing import Mix, drawn
from orchestrator.data.loading.order import batch_bounds, replica_slice, training_order
from orchestrator.data.quarantine import Quarantined
from orchestrator.errors import DataError

Indices = NDArray[np.int64]
# Samples, the epoch of training that they are augmented for, and how they are mixed.
Task = tuple[Indices, int, Mix | None]
# Told the samples of the batches to come; gives what is to be called at each batch.
Foresee = Callable[[Iterator[Indices]], AbstractContextManager[Callable[[], None]]]


@dataclass(frozen=True)
class Batch:
    """`images` (B, C, H, W) uint8 or cached features (B, D), `labels` (B,) int64, `indices` (B,) into the index,
    and of the samples that were left out (numbers in the index) why. Seconds of one thread: `decode_s` from bytes
    to pixels of size, `load_s` for all that it took. Of mixed images `partners` (B,) int64 are the other labels and
    `weight` is the share of their own."""

    images: Tensor
    labels: Tensor
    indices: Indices
    skipped: Mapping[int, str]
    decode_s: float = 0.0
    load_s: float = 0.0
    partners: Tensor | None = None
    weight: float = 1.0


def no_foresight(plan: Iterator[Indices]) -> AbstractContextManager[Callable[[], None]]:
    """For samples that are all here."""
    return nullcontext(lambda: None)


class Source(Protocol):
    """What makes a batch of chosen samples; called from several threads. `decoder` names what it works with."""

    @property
    def decoder(self) -> str: ...

    def batch(self, indices: Indices, epoch: int | None = None, mix: Mix | None = None) -> Batch:
        """The samples `indices` as they are in `epoch` of training, and mixed; None for evaluation."""


def ahead(tasks: Iterable[Callable[[], Batch]], threads: int, prefetch: int) -> Generator[Batch, None, None]:
    """Batches in order, up to `prefetch` of them made ahead by `threads` threads; with none each is made when due."""
    if threads == 0:
        for task in tasks:
            yield task()
        return
    pool = ThreadPoolExecutor(threads, thread_name_prefix="loader")
    waiting: deque[Future[Batch]] = deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(task))
            if len(waiting) >= max(prefetch, threads):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
        pool.shutdown(wait=True)


def refuse_bad(bad: Sequence[str], budget: float, samples: int) -> None:
    """Raise DataError when more of an epoch's images are bad than `data.bad_sample_budget` allows of `samples`."""
    # At least one: a budget below one image in a small set still means "a few".
    allowed = max(1, int(budget * samples)) if budget else 0
    if len(bad) > allowed:
        raise DataError(
            f"{len(bad)} images of this epoch cannot be decoded, data.bad_sample_budget allows {allowed}:\n  "
            + "\n  ".join(bad[:10])
        )


def timed(source: Source, indices: Indices, epoch: int, mix: Mix | None) -> Batch:
    """A batch with the seconds that it took."""
    began = time.perf_counter()
    batch = source.batch(indices, epoch, mix)
    return replace(batch, load_s=time.perf_counter() - began)


class TrainStream:
    """The training samples of one replica, epoch by epoch, from any step on.

    They are made by `loader_threads` of this process (0: by the thread that asks), or by other processes: `elsewhere`
    is called with the tasks and gives their batches. `mixing` are the options of mixup and cutmix; with `repeat` every
    batch is the first of all.
    """

    def __init__(
        self,
        source: Source,
        subset: Indices,
        *,
        seed: int,
        lanes: int,
        window: int,
        global_batch_size: int,
        replica: int = 0,
        replicas: int = 1,
        loader_threads: int = 1,
        prefetch_batches: int = 4,
        bad_sample_budget: float = 0.0001,
        foresee: Foresee = no_foresight,
        elsewhere: Callable[[Iterator[Task]], Generator[Batch, None, None]] | None = None,
        mixing: Mapping[str, Any] | None = None,
        repeat: bool = False,
    ) -> None:
        self._source, self._subset = source, subset
        self._elsewhere, self._mixing = elsewhere, mixing or {}
        self._repeated = global_batch_size if repeat else None
        self._seed, self._lanes, self._window = seed, lanes, window
        self._bounds = batch_bounds(len(subset), global_batch_size)
        self._replica, self._replicas = replica, replicas
        self._threads, self._prefetch, self._foresee = loader_threads, prefetch_batches, foresee
        self._budget = bad_sample_budget

    @property
    def steps_per_epoch(self) -> int:
        return len(self._bounds)

    @property
    def loader(self) -> dict[str, Any]:
        """What makes the batches, for the record of a run."""
        return {"decoder": self._source.decoder, "threads": self._threads}

    def _own(self, bounds: tuple[int, int]) -> tuple[int, int]:
        return replica_slice(*bounds, self._replica, self._replicas)

    def epoch(self, epoch: int, first_step: int = 0) -> Generator[Batch, None, None]:
        """Batches of one epoch from `first_step` on."""
        per_epoch = self.steps_per_epoch
        return self.steps(epoch * per_epoch + first_step, (epoch + 1) * per_epoch)

    def steps(self, start: int, stop: int) -> Generator[Batch, None, None]:
        """Batches of the steps start .. stop - 1, over epochs, without a pause between them.

        Close the iterator to end its threads early. Raises DataError when more images of an epoch are bad than
        the budget allows.
        """
        bad: list[str] = []
        # closing: an error that somebody keeps would otherwise keep the threads too.
        plan = (task[0] for task in self._planned(start, stop))
        with (
            self._foresee(plan) as handed_out,
            closing(self._made(self._planned(start, stop))) as batches,
        ):
            for step, batch in zip(range(start, stop), batches, strict=True):
                handed_out()
                faults = [fault for fault in batch.skipped.values() if not isinstance(fault, Quarantined)]
                bad = faults if step % self.steps_per_epoch == 0 else [*bad, *faults]
                refuse_bad(bad, self._budget, len(self._subset))
                yield batch

    def _made(self, tasks: Iterator[Task]) -> Generator[Batch, None, None]:
        if self._elsewhere is not None:
            return self._elsewhere(tasks)
        return ahead((partial(timed, self._source, *task) for task in tasks), self._threads, self._prefetch)

    def _planned(self, start: int, stop: int) -> Iterator[Task]:
        """Samples of this replica, epoch and mix of every step."""
        per_epoch = self.steps_per_epoch
        for epoch in range(start // per_epoch, -(-stop // per_epoch)):
            order = training_order(
                self._subset,
                seed=self._seed,
                epoch=epoch,
                lanes=self._lanes,
                window=self._window,
                repeated=self._repeated,
            )
            for step in range(max(start, epoch * per_epoch), min(stop, (epoch + 1) * per_epoch)):
                yield self._task(order, step, epoch)

    def _task(self, order: Indices, step: int, epoch: int) -> Task:
        bounds = self._bounds[step % self.steps_per_epoch]
        first, end = self._own(bounds)
        if self._repeated:
            step, epoch = 0, 0  # the same images in every step, not the same samples changed anew
        before = int(order[first - 1 if first > bounds[0] else bounds[1] - 1])
        return order[first:end], epoch, drawn(self._mixing, seed=self._seed, step=step, before=before)


class EvalStream:
    """Every sample of a subset exactly once, in order, in as many batches on every replica.

    Each replica has its part of every batch. A bad image is an error here.
    """

    def __init__(
        self,
        source: Source,
        subset: Indices,
        batch_size: int,
        *,
        replica: int = 0,
        replicas: int = 1,
        loader_threads: int = 1,
        prefetch_batches: int = 4,
        foresee: Foresee = no_foresight,
    ) -> None:
        self._source = source
        bounds = [(i, min(i + batch_size, len(subset))) for i in range(0, len(subset), batch_size)]
        self._batches = [subset[slice(*replica_slice(*b, replica, replicas))] for b in bounds]
        self._threads, self._prefetch, self._foresee = loader_threads, prefetch_batches, foresee

    def __iter__(self) -> Iterator[Batch]:
        tasks = (partial(self._source.batch, indices) for indices in self._batches)
        with (
            self._foresee(iter(self._batches)) as handed_out,
            closing(ahead(tasks, self._threads, self._prefetch)) as batches,
        ):
            for batch in batches:
                handed_out()
                if batch.skipped:
                    faults = "\n  ".join(batch.skipped.values())
                    remedy = "evaluation leaves none out: pack its data again without this image"
                    raise DataError(f"an image for evaluation cannot be decoded:\n  {faults}\n{remedy}")
                yield batch
