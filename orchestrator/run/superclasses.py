"""The super-classes that early layers learn: joined from the training images before the first step, kept in the run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hff.superclasses import cluster
from orchestrator.errors import JobError
from orchestrator.run.datasets import Datasets, Normalise, Part, eval_batches
from orchestrator.run.folder import RunFolder, read_json, write_json

# Enough to know what a class looks like from afar.
IMAGES_PER_CLASS = 20
SIDE = 8
_BATCH = 64


def join_classes(job: Mapping[str, Any], datasets: Datasets, folder: RunFolder) -> None:
    """Write down the super-class of every class for each layer that learns super-classes, where a job has such.

    The classes are clustered by their mean images; a run that goes on keeps what it began with. Raises JobError for
    more super-classes than classes.
    """
    wanted, classes = job["objective"].get("coarse") or (), len(datasets.classes)
    for place, groups in enumerate(wanted):
        if groups > classes:
            raise JobError(f"objective.coarse.{place}: must be at most {classes}, the number of classes, got {groups}")
    if wanted and read_json(folder.superclasses) is None:
        write_json(folder.superclasses, cluster(mean_images(job, datasets.train, classes), wanted))


def joined_classes(folder: RunFolder) -> list[list[int]]:
    """The super-class of every class, for each layer from the first on that learns super-classes."""
    found: list[list[int]] = read_json(folder.superclasses) or []
    return found


def mean_images(job: Mapping[str, Any], part: Part, classes: int) -> Tensor:
    """The mean of the first training images of each class, small, (classes, numbers)."""
    labels = part.index.labels[part.subset]
    chosen = [part.subset[labels == label][:IMAGES_PER_CLASS] for label in range(classes)]
    some = Part(part.index, np.sort(np.concatenate(chosen)))
    ready = Normalise(job["data"], torch.device("cpu"), torch.float32)
    total = torch.zeros(classes, job["data"]["channels"] * SIDE * SIDE)
    for batch in eval_batches(some, dict(job), ready, batch_size=_BATCH, replica=0, replicas=1):
        small = F.adaptive_avg_pool2d(batch.x, SIDE).flatten(1)
        total.index_add_(0, batch.target, small)
    count = torch.tensor([max(1, len(c)) for c in chosen])
    return total / count[:, None]
