"""Images of an index as batches: a WebDataset pipeline per batch, reader -> decode and crop -> batch and augment."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import webdataset

from orchestrator.data.images.augment import Augmenter
from orchestrator.data.images.decode import BadImage, Fault, Pixels, decode
from orchestrator.data.images.jpeg import decode_plain, decoder_name
from orchestrator.data.images.mixing import Mix, mixed, places
from orchestrator.data.images.resize import resize_into
from orchestrator.data.index import Index
from orchestrator.data.loading.kept import Kept
from orchestrator.data.loading.stream import Batch, Indices
from orchestrator.data.quarantine import quarantined
from orchestrator.data.reader import ShardReader

Samples = dict[str, Any]


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
