"""Features of a frozen trunk: which sets a job needs, under which keys, and the worker that computes their shards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hff.layers import LocalLayer, channels_last
from orchestrator.data.cached.feature_store import MadeShard, SetPlan, feature_key, write_shard
from orchestrator.data.cached.features import FeatureFolders, Vectors
from orchestrator.data.index import Index
from orchestrator.data.loading.image_source import ImageSource
from orchestrator.data.loading.stream import Batch, ahead
from orchestrator.data.loading.threads import loader_threads
from orchestrator.data.stores.remote_index import open_data
from orchestrator.errors import CheckpointError, Interrupted, JobError, OrchestratorError
from orchestrator.run import checkpoint, network
from orchestrator.run.datasets import Datasets, Normalise
from orchestrator.run.inference.classifier import framing
from orchestrator.transfer.cached import cached_parts, trunk_parts, trunk_sha256, trunk_units

_VERSION = 1
_BATCH = 64
_STOP = ".stop"


@dataclass(frozen=True)
class Trunk:
    """What a key needs to know of a frozen trunk: for each unit, the numbers that it sees and its weights' hash."""

    parts: tuple[int, ...]
    sha256: tuple[str, ...]


@dataclass(frozen=True)
class Wanted:
    """A feature set that a job needs: its name for people, its plan, the place of its images' index.

    `epoch` is the epoch of training whose augmentation its images have; None for images as evaluation sees them.
    `cache` is where shards of remote images are kept.
    """

    name: str
    plan: SetPlan
    source: str
    epoch: int | None
    cache: Mapping[str, Any] | None = None


def build_trunk(
    job: Mapping[str, Any], num_classes: int, device: torch.device, weights_from: str | None = None
) -> list[LocalLayer]:
    """The units of a job's network that hold its frozen trunk, with the weights of a checkpoint where one is given."""
    size = job["data"]["image_size"]
    layers = network.build(
        job["model"],
        job["objective"],
        input_shape=(job["data"]["channels"], size, size),
        num_classes=num_classes,
        seed=job["train"]["seed"],
        precision=job["train"]["precision"],
        pretrained=weights_from is None,
    )
    units = trunk_units(layers)
    if weights_from is not None:
        for number, unit in enumerate(units):
            checkpoint.load_layer(Path(weights_from), number, unit)
    return [channels_last(unit.to(device)) for unit in units]


def examine(job: Mapping[str, Any], num_classes: int, weights_from: str | None) -> Trunk:
    """The facts of the trunk of a job."""
    units = build_trunk(job, num_classes, torch.device("cpu"), weights_from)
    end_to_end = job["objective"]["name"] == "bp"
    parts = cached_parts(job["model"], job["data"]["image_size"], end_to_end=end_to_end)
    return Trunk(parts, hashes(units))


def hashes(units: Sequence[LocalLayer]) -> tuple[str, ...]:
    """The hash of the frozen weights of each unit."""
    return tuple(trunk_sha256([unit]) for unit in units)


def recipe(job: Mapping[str, Any], trunk: Trunk, index_sha256: str, epoch: int | None) -> dict[str, Any]:
    """Everything that decides the numbers of a feature set, as plain values."""
    data, model = job["data"], job["model"]
    transform = {key: data[key] for key in ("image_size", "channels", "mean", "std")} | framing(data)
    augmented = None
    if epoch is not None:
        augmented = {"augment": data["augment"], "seed": job["train"]["seed"], "epoch": epoch}
    return {
        "version": _VERSION,
        "timm": version("timm"),
        "backbone": model["backbone"],
        "weights_sha256": list(trunk.sha256),
        "head_grid": model["head_grid"],
        "parts": list(trunk.parts),
        "precision": job["train"]["precision"],
        "transform": transform,
        "augmented": augmented,
        "dtype": job["features"]["dtype"],
        "index_sha256": index_sha256,
    }


def features_folder(runs: Path) -> Path:
    return runs / ".features"


def wanted_sets(job: Mapping[str, Any], datasets: Datasets, trunk: Trunk) -> tuple[list[Wanted], FeatureFolders]:
    """The sets that a job trains and is evaluated on, and where they lie.

    Without augmentation the training images have one set, which serves the held-out part of them too. A view is
    a set of its own, so more views of the same job keep those that are there.
    """
    wanted: dict[str, Wanted] = {}

    def want(name: str, index: Index, epoch: int | None) -> str:
        content = recipe(job, trunk, index.sha256, epoch)
        folder = str(features_folder(Path(job["runs"])) / feature_key(content))
        plan = SetPlan(folder, content, trunk.parts, job["features"]["dtype"], index.num_samples)
        wanted.setdefault(folder, Wanted(name, plan, index.place, epoch, job["data"].get("cache")))
        return folder

    count = job["features"]["views"]
    train = datasets.train.index
    if count == 1:
        views = [want("train", train, None)]
    else:
        views = [want(f"train, view {v + 1} of {count}", train, v) for v in range(count)]
    plain = {train.sha256: want("train, not augmented", train, None)}
    for name, part in (("val", datasets.val), ("test", datasets.test)):
        if part is not None and part.index.sha256 not in plain:
            plain[part.index.sha256] = want(name, part.index, None)
    return list(wanted.values()), FeatureFolders(trunk.parts, trunk.sha256, tuple(views), plain)


def ask_to_stop(plan: SetPlan) -> None:
    """Ask all workers that make shards of a set to leave theirs unfinished."""
    (plan.partial / _STOP).touch()


class Extractor:
    """One worker: computes shards of any set of one job."""

    def __init__(
        self,
        job: Mapping[str, Any],
        num_classes: int,
        trunk: Trunk,
        device: torch.device,
        weights_from: str | None = None,
    ) -> None:
        self._job, self._device = job, device
        self._units = build_trunk(job, num_classes, device, weights_from)
        found = hashes(self._units)
        if found != trunk.sha256:
            raise CheckpointError(
                f"model.pretrained: {job['model']['pretrained']}: this worker got other weights than the driver: "
                f"expected SHA-256 {', '.join(trunk.sha256)}, found {', '.join(found)}"
            )
        self._normalise = Normalise(job["data"], device, network.DTYPES[job["train"]["precision"]])

    def shard(self, wanted: Wanted, number: int, tick: Callable[[], None] = lambda: None) -> MadeShard:
        """Compute and write shard `number` of a set; `tick` is called after each batch.

        Raises Interrupted when the set was asked to stop, JobError when the numbers do not fit the dtype.
        """
        index = open_data(wanted.source, cache=wanted.cache)
        return write_shard(wanted.plan, index, number, self._batches(wanted, index, number, tick))

    def _batches(
        self, wanted: Wanted, index: Index, number: int, tick: Callable[[], None]
    ) -> Iterator[tuple[Vectors, dict[int, str]]]:
        data = self._job["data"]
        source = ImageSource(
            index,
            image_size=data["image_size"],
            channels=data["channels"],
            augment=data["augment"],
            seed=self._job["train"]["seed"],
            **framing(data),
        )
        start, stop = wanted.plan.ranges[number]
        rows = [np.arange(i, min(i + _BATCH, stop)) for i in range(start, stop, _BATCH)]
        tasks = (partial(source.batch, indices, wanted.epoch) for indices in rows)
        threads = loader_threads(data["loader_threads"], source, np.arange(start, stop))
        made = ahead(tasks, threads, data["prefetch_batches"])
        try:
            for indices, batch in zip(rows, made, strict=True):
                if (wanted.plan.partial / _STOP).exists():
                    raise Interrupted("the extraction of features was stopped; finished shards are kept")
                yield self._vectors(wanted, index, indices, batch)
                tick()
        finally:
            made.close()

    def _vectors(
        self, wanted: Wanted, index: Index, indices: np.ndarray[Any, Any], batch: Batch
    ) -> tuple[Vectors, dict[int, str]]:
        """Vectors of all `indices`: zeros, and the fault, for those that are no images."""
        whole = np.isin(indices, batch.indices)
        vectors: Vectors = np.zeros((len(indices), wanted.plan.layout.width), dtype=wanted.plan.dtype)
        if whole.any():
            computed = self._computed(batch.images).cpu()
            vectors[whole] = computed.to(getattr(torch, wanted.plan.dtype)).numpy()
            _refuse_unusable(computed, vectors[whole], index.key(int(indices[whole][0])), wanted.plan.dtype)
        return vectors, dict(batch.skipped)

    def _computed(self, images: Tensor) -> Tensor:
        bfloat16 = self._job["train"]["precision"] == "bfloat16"
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=bfloat16):
            return torch.cat(trunk_parts(self._units, self._normalise(images)), dim=1)


def _refuse_unusable(computed: Tensor, vectors: Vectors, key: str, dtype: str) -> None:
    if np.isfinite(vectors).all():
        return
    if not bool(torch.isfinite(computed).all()):
        raise OrchestratorError(f"the backbone's output is not finite for an image of the batch at key {key}")
    raise JobError(
        f"features.dtype: must be float32 for this backbone, got {dtype!r}: its output reaches "
        f"{float(computed.abs().max()):g}, more than float16 can hold"
    )
