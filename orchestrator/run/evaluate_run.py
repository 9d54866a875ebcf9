"""Classify a data set with the newest checkpoint of a run, in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from hff.local import make_optimizer
from orchestrator.errors import DataError
from orchestrator.pipeline.stage import Stage
from orchestrator.run import network
from orchestrator.run.context import Control
from orchestrator.run.datasets import Normalise, Part, eval_batches, open_datasets
from orchestrator.run.evaluate import evaluate
from orchestrator.run.trained import trained_run, vote_weights

_BATCH = 250


def evaluate_run(run: Path, location: str | None) -> dict[str, Any]:
    """Accuracy of the network and of each layer on `location`, or on the run's own validation data.

    Raises CheckpointError without a whole checkpoint and DataError for data of other classes.
    """
    trained = trained_run(run)
    job = trained.job
    datasets = open_datasets(job)
    part = datasets.val if location is None else _foreign(location, trained.classes)
    if part is None:
        raise DataError(f"{run}: its job names no validation data; give some with --data OUT")
    layers = [layer.to(memory_format=torch.channels_last) for layer in trained.layers()]
    device = torch.device("cpu")
    stage = Stage(
        first=0,
        layers=layers,
        optimizers=[make_optimizer(layer, "sgd", lr=1.0) for layer in layers],
        receiver=None,
        sender=None,
        learning_rate=lambda step, layer: 0.0,
        trained=lambda step: None,
        output_shape=(),
        device=device,
    )
    normalise = Normalise(job["data"], device, network.DTYPES[trained.description["precision"]])
    batches = eval_batches(part, job, normalise, batch_size=_BATCH, replica=0, replicas=1)
    result = evaluate(
        stage,
        batches,
        vote_weights=vote_weights(trained.description, len(layers)),
        num_classes=len(trained.classes),
        is_last=True,
        control=Control(1),
    )
    return {
        "run": trained.name,
        "step": trained.step,
        "data": part.index.place,
        "samples": result.samples,
        "top1": result.top1,
        "top5": result.top5,
        "layer_top1": list(result.layer_top1.values()),
    }


def _foreign(location: str, classes: list[str]) -> Part:
    from orchestrator.data.remote_index import open_data

    index = open_data(location)
    if list(index.classes) != classes:
        raise DataError(f"{location}: its {len(index.classes)} classes are not the {len(classes)} of the run")
    return Part(index, np.arange(index.num_samples, dtype=np.int64))
