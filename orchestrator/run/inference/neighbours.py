"""The control that trains nothing: nearest neighbours among the cached features of the last stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from orchestrator.data.cached.features import FeatureFolders, FeatureSet, FeatureSource
from orchestrator.data.loading.stream import EvalStream, Source
from orchestrator.data.split import shuffled_labels
from orchestrator.run.datasets import Datasets, Indices, Part
from orchestrator.transfer.backbone import trunk_shape
from orchestrator.transfer.knn import knn_votes

_BATCH = 8192


def neighbours_top1(
    job: Mapping[str, Any], datasets: Datasets, folders: FeatureFolders, device: torch.device
) -> dict[str, float | None]:
    """Top-1 accuracy on val and test of 20 weighted nearest neighbours among the training images.

    `folders` belongs to a job with its only head behind the last stage, whose grid is averaged: features are the
    stage's channels. Labels are shuffled where the job says so, as for every other control.
    """
    shape = trunk_shape(job["model"]["backbone"], job["data"]["image_size"]).stages[-1].output
    channels = shape[0] if len(shape) == 3 else shape[-1]

    def averaged(features: Tensor) -> Tensor:
        return features.to(device).float().view(len(features), channels, -1).mean(dim=2)

    train = datasets.train
    labels = None
    if job["data"]["shuffle_labels"]:
        labels = shuffled_labels(train.index.labels, train.subset, job["train"]["seed"])
    known = FeatureSource([FeatureSet(folders.plain[train.index.sha256])], labels)

    def top1(part: Part | None) -> float | None:
        if part is None:
            return None
        source = FeatureSource([FeatureSet(folders.plain[part.index.sha256])])
        right = 0
        for batch in EvalStream(source, part.subset, _BATCH):
            pieces = ((averaged(features), classes.to(device)) for features, classes in _pieces(known, train.subset))
            votes = knn_votes(pieces, averaged(batch.images), num_classes=len(datasets.classes))
            right += int((votes.argmax(dim=1).cpu() == batch.labels).sum())
        return right / len(part.subset)

    return {"val_top1": top1(datasets.val), "test_top1": top1(datasets.test)}


def _pieces(source: Source, subset: Indices) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(subset), _BATCH):
        batch = source.batch(subset[start : start + _BATCH])
        yield batch.images, batch.labels
