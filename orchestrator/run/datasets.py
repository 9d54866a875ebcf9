"""From the job's data section to indexes, subsets and streams."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orchestrator.data.agree import open_all
from orchestrator.data.cached.features import FeatureFolders, FeatureSet, FeatureSource
from orchestrator.data.images.decode import Fault
from orchestrator.data.images.resize import training_size
from orchestrator.data.index import Index
from orchestrator.data.loading.image_source import ImageSource
from orchestrator.data.loading.order import training_order
from orchestrator.data.loading.processes import in_processes
from orchestrator.data.loading.stream import Batch, EvalStream, Foresee, Source, TrainStream, no_foresight
from orchestrator.data.loading.threads import loader_threads
from orchestrator.data.packing.pack import pack
from orchestrator.data.quarantine import FILE, quarantined
from orchestrator.data.split import hold_out, shuffled_labels, split_from_train
from orchestrator.data.stores.prefetch import foreseen
from orchestrator.data.stores.remote import summed
from orchestrator.data.stores.remote_index import RemoteShards, open_data
from orchestrator.errors import DataError, JobError
from orchestrator.job.network import vote_share
from orchestrator.pipeline.stage import StageInput
from orchestrator.run.device import ToDevice
from orchestrator.run.inference.classifier import framing, pixel_statistics
from orchestrator.run.pairs import Pairs

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Part:
    """Samples of one index that serve one purpose."""

    index: Index
    subset: Indices


@dataclass(frozen=True)
class Datasets:
    """What a run trains on, selects with and is tested on; `vote` is what vote weights are fitted on."""

    train: Part
    val: Part | None
    test: Part | None
    vote: Part | None = None

    @property
    def classes(self) -> list[str]:
        return list(self.train.index.classes)

    def remote_counts(self) -> dict[str, float] | None:
        """What reading from afar cost this process so far, over all parts; None where all data are local."""
        stores = {id(p.index): p.index.store for p in (self.train, self.val, self.test) if p is not None}
        return summed([store.counters.values() for store in stores.values() if isinstance(store, RemoteShards)])


def embedded_folder(runs: Path) -> Path:
    """Where the embedded dataset `digits` is packed on first use."""
    return runs / ".data" / "digits"


def prepare_embedded(data: dict[str, Any], runs: Path) -> None:
    """Pack the embedded dataset if the job uses it; one process does this before the workers start."""
    if "digits" in (data["train"], data["val"], data["test"]):
        folder = embedded_folder(runs)
        if not (folder / "index.json").exists():
            pack("digits", folder)


def _open(data: dict[str, Any], runs: Path, location: str) -> Index:
    return open_data(embedded_folder(runs) if location == "digits" else location, cache=data.get("cache"))


def open_datasets(job: dict[str, Any]) -> Datasets:
    """Open the indexes of a job and check them against each other and against `data.expect`.

    Raises DataError naming the keys of the job.
    """
    data, runs = job["data"], Path(job["runs"])
    indexes = open_all(data, partial(_open, data, runs))
    train_index = indexes["train"]
    whole = np.arange(train_index.num_samples, dtype=np.int64)
    val: Part | None = None
    subset = whole
    if isinstance(data["val"], dict):
        subset, held_out = split_from_train(train_index, data["val"]["from_train"])
        val = Part(train_index, held_out)
    elif "val" in indexes:
        val = _whole(indexes["val"])
    test = _whole(indexes["test"]) if "test" in indexes else None
    datasets = Datasets(Part(train_index, subset), val, test)
    share = vote_share(job["model"]["vote"], job["train"]["vote_from_train"], len(subset))
    return datasets if share is None else _with_vote(datasets, share)


def refuse_large_batch(datasets: Datasets, batch: int) -> None:
    """Raise JobError for a batch of more samples than an epoch has."""
    samples = len(datasets.train.subset)
    if batch > samples:
        text = f"must be at most the {samples} training samples, got {batch}"
        raise JobError(findings=[("train.global_batch_size", text)])


def refuse_quarantined(datasets: Datasets) -> None:
    """Raise DataError for samples in quarantine that are evaluated on, before hours of training end at them."""
    findings = []
    for key, part in (("val", datasets.val), ("test", datasets.test)):
        known = quarantined(part.index) if part is not None else {}
        bad = [i for i in known if part is not None and i in part.subset]
        if part is not None and bad:
            text = (
                f"{part.index.place}: {len(bad)} of its images are in {FILE} (first: key {part.index.key(bad[0])}); "
                "evaluation leaves none out: pack the data again without them"
            )
            findings.append((f"data.{key}", text))
    if findings:
        raise DataError(findings=findings)


def _with_vote(datasets: Datasets, share: float) -> Datasets:
    """Take what vote weights are fitted on out of the training images: stratified, before training."""
    index, remedy = datasets.train.index, "use another train.vote_from_train, or model.vote: last"
    rest, held = hold_out(index, datasets.train.subset, share, purpose="vote", remedy=remedy)
    return replace(datasets, train=Part(index, rest), vote=Part(index, held))


def open_classes(data: dict[str, Any], runs: Path) -> list[str]:
    """The names of the classes, in order."""
    train_alone = {**data, "val": None, "test": None, "expect": None}
    return list(open_all(train_alone, partial(_open, data, runs))["train"].classes)


def _whole(index: Index) -> Part:
    return Part(index, np.arange(index.num_samples, dtype=np.int64))


class Sources:
    """What a job's batches are made of: its images, or the features of a frozen trunk that were kept of them."""

    def __init__(self, job: dict[str, Any], features: FeatureFolders | None = None) -> None:
        self._job, self._features = job, features
        data = job["data"]
        self._decoding = {
            "image_size": data["image_size"],
            "channels": data["channels"],
            # A run of a GPU may be evaluated on a machine without.
            "pin_memory": job["cluster"]["use_gpu"] and torch.cuda.is_available(),
            **framing(data),
        }

    def training(self, part: Part, labels: Indices | None) -> Source:
        """Training samples as they are in each epoch; `labels` replaces the labels of the index."""
        if self._features is not None:
            return FeatureSource([FeatureSet(folder) for folder in self._features.views], labels)
        data, seed = self._job["data"], self._job["train"]["seed"]
        return ImageSource(
            part.index,
            augment=data["augment"],
            seed=seed,
            labels=labels,
            keep_bytes=data["decoded_cache_mb"] * 10**6,
            training_size=self._training_size(),
            **self._decoding,
        )

    def _training_size(self) -> Callable[[int], int] | None:
        data, epochs = self._job["data"], self._job["train"]["epochs"]
        if data["progressive"] is None:
            return None
        return partial(training_size, full=data["image_size"], epochs=epochs, **data["progressive"])

    def evaluation(self, part: Part) -> Source:
        """Samples without augmentation."""
        if self._features is not None:
            return FeatureSource([FeatureSet(self._features.plain[part.index.sha256])])
        return ImageSource(part.index, **self._decoding)


def train_stream(
    datasets: Datasets,
    job: dict[str, Any],
    *,
    replica: int,
    replicas: int,
    features: FeatureFolders | None = None,
) -> TrainStream:
    """The training samples of one replica of the first stage."""
    data, train = job["data"], job["train"]
    part = datasets.train
    source, processes = _training_source(datasets, job, features), data["loader_processes"]
    elsewhere = None
    if processes:
        remade = partial(_remade_source, job, features)
        elsewhere = partial(in_processes, remade, processes=processes, prefetch=data["prefetch_batches"])
    return TrainStream(
        source,
        part.subset,
        seed=train["seed"],
        lanes=data["lanes"],
        window=data["shuffle_window"],
        global_batch_size=train["global_batch_size"],
        replica=replica,
        replicas=replicas,
        loader_threads=processes or loader_threads(data["loader_threads"], source, part.subset),
        prefetch_batches=data["prefetch_batches"],
        bad_sample_budget=data["bad_sample_budget"],
        foresee=_foresight(part, features, parts=not processes),
        elsewhere=elsewhere,
        mixing=data["augment"],
        repeat=data["repeat_batch"],
    )


def _training_source(datasets: Datasets, job: dict[str, Any], features: FeatureFolders | None) -> Source:
    part, labels = datasets.train, None
    if job["data"]["shuffle_labels"]:
        labels = shuffled_labels(part.index.labels, part.subset, job["train"]["seed"])
    return Sources(job, features).training(part, labels)


def _remade_source(job: dict[str, Any], features: FeatureFolders | None) -> Source:
    """The same in another process, which must not touch the GPU, nor keep what its neighbours keep."""
    job = job | {"cluster": job["cluster"] | {"use_gpu": False}, "data": job["data"] | {"decoded_cache_mb": 0}}
    return _training_source(open_datasets(job), job, features)


def _foresight(part: Part, features: FeatureFolders | None, *, parts: bool = True) -> Foresee:
    """Who fetches ahead: nobody where cached features stand for the images."""
    return partial(foreseen, part.index, parts=parts) if features is None else no_foresight


def planned_keys(part: Part, job: dict[str, Any], epoch: int, samples: int) -> list[str]:
    """Keys of the first `samples` samples of an epoch, in order."""
    order = training_order(
        part.subset,
        seed=job["train"]["seed"],
        epoch=epoch,
        lanes=job["data"]["lanes"],
        window=job["data"]["shuffle_window"],
        repeated=job["train"]["global_batch_size"] if job["data"]["repeat_batch"] else None,
    )
    return [part.index.key(int(i)) for i in order[:samples]]


class Normalise:
    """uint8 images (B, C, H, W) to the network's dtype on the device: (x / 255 - mean) / std per channel."""

    def __init__(self, data: dict[str, Any], device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype, self._to_device = device, dtype, ToDevice(device)
        mean, scale = pixel_statistics(data, dtype)
        self.mean, self.scale = mean.to(device), scale.to(device)

    def __call__(self, images: Tensor) -> Tensor:
        x = self._to_device(images).to(self.dtype, memory_format=torch.channels_last)
        return x.sub_(self.mean).mul_(self.scale)


class Numbers:
    """Features (B, D) to the network's dtype on the device."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype, self._to_device = device, dtype, ToDevice(device)

    def __call__(self, features: Tensor) -> Tensor:
        return self._to_device(features).to(self.dtype)


Ready = Normalise | Numbers


def eval_batches(
    part: Part,
    job: dict[str, Any],
    normalise: Ready,
    *,
    batch_size: int,
    replica: int,
    replicas: int,
    features: FeatureFolders | None = None,
) -> Iterator[StageInput]:
    """Every sample of this replica's share of each `batch_size` exactly once; the last batch is marked.

    All replicas get the same number of batches; theirs may be empty.
    """
    data = job["data"]
    source = Sources(job, features).evaluation(part)
    stream = EvalStream(
        source,
        part.subset,
        batch_size,
        replica=replica,
        replicas=replicas,
        loader_threads=loader_threads(data["loader_threads"], source, part.subset),
        prefetch_batches=data["prefetch_batches"],
        foresee=_foresight(part, features),
    )
    held: Batch | None = None
    step = 0
    for batch in stream:
        if held is not None:
            yield _stage_input(held, step, normalise, last=False)
            step += 1
        held = batch
    if held is None:
        held = source.batch(np.zeros(0, dtype=np.int64))
    yield _stage_input(held, step, normalise, last=True)


def _stage_input(batch: Batch, step: int, normalise: Ready, *, last: bool) -> StageInput:
    return StageInput(step, normalise(batch.images), batch.labels.to(normalise.device, non_blocking=True), last=last)


class TrainFeed:
    """Training batches of the first stage by step, over epochs, with a clean end."""

    def __init__(
        self,
        stream: TrainStream,
        normalise: Ready,
        start: int,
        stop: int,
        stop_requested: Callable[[], bool],
        pairs: Pairs | None = None,
    ) -> None:
        self._normalise, self._stop_requested, self._pairs = normalise, stop_requested, pairs
        self._step = start
        self._batches = stream.steps(start, stop)
        self.consumed: list[tuple[int, Indices, list[int]]] = []
        self.loader: dict[str, Any] = stream.loader | {"images": 0, "decode_s": 0.0, "load_s": 0.0}
        self.skipped: Counter[str] = Counter()

    def next(self) -> StageInput:
        """The next batch; waits for it if decoding is behind."""
        batch = next(self._batches)
        step, self._step = self._step, self._step + 1
        self.consumed.append((step, batch.indices, list(batch.skipped)))
        self.skipped.update(getattr(fault, "reason", Fault.reason) for fault in batch.skipped.values())
        for name, number in (("images", len(batch.indices)), ("decode_s", batch.decode_s), ("load_s", batch.load_s)):
            self.loader[name] += number
        labels = batch.labels.to(self._normalise.device, non_blocking=True)
        x = self._normalise(batch.images)
        if self._pairs is not None:
            x = self._pairs(x, labels, batch.indices, step)
        partner = None if batch.partners is None else batch.partners.to(labels.device, non_blocking=True)
        return StageInput(
            step, x, labels, stop=self._stop_requested(), partner=partner, partner_weight=1 - batch.weight
        )

    def take_consumed(self) -> list[tuple[int, Indices, list[int]]]:
        """Step, samples and left-out samples of every batch since the last call."""
        taken, self.consumed = self.consumed, []
        return taken

    def close(self) -> None:
        """End the loader threads."""
        self._batches.close()
