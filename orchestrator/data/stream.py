"""Batches in order, exactly once, made ahead in threads: of images here, of whatever a `Source` gives in general.

The source of images is a WebDataset pipeline per batch: our indexed reader -> decode and crop -> batch and augment
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
import webdataset
from numpy.typing import NDArray
from torch import Tensor

from orchestrator.data.augment import Augmenter
from orchestrator.data.decode import BadImage, Fault, Pixels, decode
from orchestrator.data.index import Index
from orchestrator.data.jpeg import decode_plain, decoder_name
from orchestrator.data.kept import Kept
from orchestrator.data.mixing import Mix, drawn, mixed, places
from orchestrator.data.order import batch_bounds, replica_slice, training_order
from orchestrator.data.quarantine import Quarantined, quarantined
from orchestrator.data.reader import ShardReader
from orchestrator.data.resize import resize_into
from orchestrator.errors import DataError

Indices = NDArray[np.int64]
Samples = dict[str, Any]
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


class ImageSource:
    """Decoded images of an index, augmented in training. The stages of the pipeline, as WebDataset composes them.

    With `pin_memory` batches lie where a GPU can fetch them beside its computing. Decoded images are kept where all of
    the index fit into `keep_bytes` and no random crop decides what is decoded. `training_size` is the side of the
    images of an epoch, where it is not always `image_size`.
    """

    def __init__(
        self,
        index: Index,
        *,
        image_size: int,
        channels: int,
        augment: Mapping[str, Any] | None = None,
        seed: int = 0,
        labels: Indices | None = None,
        crop_share: float | None = None,
        interpolation: str = "bilinear",
        pin_memory: bool = False,
        keep_bytes: int = 0,
        training_size: Callable[[int], int] | None = None,
    ) -> None:
        self._training_size = training_size
        self._pin_memory = pin_memory
        self._kept: Kept | None = None
        one_size = training_size is None and not (augment or {}).get("resized_crop")
        if index.num_samples * image_size**2 * channels <= keep_bytes and one_size:
            self._kept = Kept(index.num_samples, (image_size, image_size, channels))
        # Not index.labels: a column of ten million rows is not read for one batch.
        self._labels = index.members["label"] if labels is None else labels
        self._reader, self._quarantined = ShardReader(index), quarantined(index)
        self._image_size, self._channels = image_size, channels
        self._augment, self._seed, self._interpolation = augment or {}, seed, interpolation
        self._decode = partial(
            decode,
            channels=channels,
            plain_jpeg=decode_plain,
            crop_share=crop_share,
            interpolation=interpolation,
        )

    @property
    def decoder(self) -> str:
        """The package that decodes plain JPEGs here, with its version."""
        return decoder_name()

    def batch(self, indices: Indices, epoch: int | None = None, mix: Mix | None = None) -> Batch:
        """Run one batch through the pipeline; `mix` mixes it behind all else."""
        if mix is None:
            return self._plain(indices, epoch)
        planned = np.concatenate([[mix.before], indices])
        return self._mixed(planned, self._plain(planned, epoch), mix)

    def _mixed(self, planned: Indices, batch: Batch, mix: Mix) -> Batch:
        """The images of `planned`, the first of which is a partner alone, each mixed with the one before it."""
        rows, partners = places(planned, ~np.isin(planned, list(batch.skipped)))
        images_BHWC = batch.images.permute(0, 2, 3, 1)
        images, weight = mixed(images_BHWC[rows], images_BHWC[partners], mix)
        if self._pin_memory:
            images = images.pin_memory()
        return replace(
            batch,
            images=images.permute(0, 3, 1, 2),
            labels=batch.labels[rows],
            indices=batch.indices[rows.numpy()],
            skipped={i: fault for i, fault in batch.skipped.items() if i in planned[1:]},
            partners=batch.labels[partners],
            weight=weight,
        )

    def _plain(self, indices: Indices, epoch: int | None) -> Batch:
        augmenter = None if epoch is None else Augmenter(self._augment, seed=self._seed, epoch=epoch)
        size = self._image_size
        if epoch is not None and self._training_size is not None:
            size = self._training_size(epoch)
        shape = (len(indices), size, size, self._channels)
        rows = torch.empty(shape, dtype=torch.uint8, pin_memory=self._pin_memory).numpy()
        if self._kept is not None and self._kept.fill(rows, indices):
            return self._batch(rows, indices, {}, augmenter)
        # Stages that work on whole batches: a step of Python for each sample would hold the interpreter's lock longer
        # than decoding a small image takes.
        pipeline = webdataset.DataPipeline(
            lambda: iter([self._samples(indices, rows, augmenter)]),
            webdataset.map(self._decoded),
            webdataset.map(partial(self._augmented, augmenter=augmenter)),
        )
        batch: Batch = next(iter(pipeline))
        return batch

    def _samples(self, indices: Indices, rows: Pixels, augmenter: Augmenter | None) -> Samples:
        """Source: samples of a batch by column, as `webdataset.batched` gives them, and where their pixels belong."""
        known = {i: self._quarantined[i] for i in indices.tolist() if i in self._quarantined}
        if known:
            indices = indices[[i not in known for i in indices.tolist()]]
        read = self._reader.read_many(indices)
        return {
            "__key__": [key for key, _, _ in read],
            "__index__": indices,
            "__fault__": known,
            "__crop__": augmenter.crops(indices) if augmenter else None,
            "__rows__": rows[: len(indices)],
            "image": [data for _, _, data in read],
        }

    def _decoded(self, samples: Samples) -> Samples:
        """Fill the rows of the batch; what cannot be decoded is left out."""
        rows, crops, decode = samples["__rows__"], samples["__crop__"], self._decode
        faults: dict[int, Fault] = {}
        began = time.perf_counter()
        for place, (data, row) in enumerate(zip(samples["image"], rows, strict=True)):
            try:
                if crops is None:
                    pixels = decode(data, image_size=len(row), row=row)
                else:
                    resize = resize_into(row, self._interpolation)
                    pixels = decode(data, image_size=len(row), crop=crops[place], resize=resize)
            except BadImage as error:
                faults[place] = self._fault(samples, place, error)
                continue
            if pixels is not row:
                row[...] = pixels
        seconds = time.perf_counter() - began
        if faults:
            whole = [place for place in range(len(rows)) if place not in faults]
            named = {int(samples["__index__"][place]): fault for place, fault in faults.items()}
            samples |= {"__index__": samples["__index__"][whole], "__fault__": samples["__fault__"] | named}
            rows = rows[whole]
        if self._kept is not None:
            self._kept.keep(samples["__index__"], rows)
        return samples | {"__rows__": rows, "__seconds__": seconds}

    def _fault(self, samples: Samples, place: int, error: BadImage) -> Fault:
        path = self._reader.path(int(samples["__index__"][place]))
        fault = Fault(f"{path}: key {samples['__key__'][place]}: {error}")
        fault.reason = error.reason
        return fault

    def _augmented(self, samples: Samples, augmenter: Augmenter | None) -> Batch:
        batch = self._batch(samples["__rows__"], samples["__index__"], samples["__fault__"], augmenter)
        return replace(batch, decode_s=samples["__seconds__"])

    def _batch(self, pixels: Pixels, indices: Indices, faults: Mapping[int, str], augmenter: Augmenter | None) -> Batch:
        """Augment decoded images, (B, H, W, C), and make tensors of them."""
        if augmenter and len(indices):
            pixels = augmenter.batch(pixels, indices)
        images = torch.from_numpy(pixels)
        if self._pin_memory:
            images = images.pin_memory()  # nothing to do unless augmentation made new arrays
        labels = torch.from_numpy(self._labels[indices].astype(np.int64))
        # A view: channels stay last in memory, as the device wants them.
        return Batch(images.permute(0, 3, 1, 2), labels, indices, faults)


def ahead(tasks: Iterable[Callable[[], Batch]], threads: int, prefetch: int) -> Generator[Batch, None, None]:
    """Batches in order, up to `prefetch` of them being made ahead by `threads` threads."""
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


def timed(source: Source, indices: Indices, epoch: int, mix: Mix | None) -> Batch:
    """A batch with the seconds that it took."""
    began = time.perf_counter()
    batch = source.batch(indices, epoch, mix)
    return replace(batch, load_s=time.perf_counter() - began)


class TrainStream:
    """The training samples of one replica, epoch by epoch, from any step on.

    They are made by `loader_threads` of this process, or by other processes: `elsewhere` is called with the tasks and
    gives their batches. `mixing` are the options of mixup and cutmix; with `repeat` every batch is the first of all.
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
        # At least one: a budget below one image in a small set still means "a few".
        self._allowed = max(1, int(bad_sample_budget * len(subset))) if bad_sample_budget else 0

    @property
    def steps_per_epoch(self) -> int:
        return len(self._bounds)

    @property
    def loader(self) -> dict[str, Any]:
        """What makes the batches, for the record of a run."""
        return {"decoder": self._source.decoder, "threads": self._threads}

    @property
    def max_batch(self) -> int:
        """Most samples that this replica gets in one step."""
        return max(b - a for a, b in map(self._own, self._bounds))

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
                if len(bad) > self._allowed:
                    raise DataError(
                        f"{len(bad)} images of this epoch cannot be decoded, data.bad_sample_budget allows "
                        f"{self._allowed}:\n  " + "\n  ".join(bad[:10])
                    )
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
                    raise DataError(f"an image for evaluation cannot be decoded:\n  {faults}")
                yield batch
