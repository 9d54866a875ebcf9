"""Classify a data set with the newest checkpoint of a run, in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from hff.local import make_optimizer
from orchestrator.errors import CheckpointError, DataError
from orchestrator.job.load import load_job
from orchestrator.job.resolved import job_to_dict
from orchestrator.pipeline.stage import Stage
from orchestrator.run import checkpoint, network
from orchestrator.run.context import Control
from orchestrator.run.datasets import Normalise, Part, eval_batches, open_datasets
from orchestrator.run.evaluate import evaluate
from orchestrator.run.folder import RunFolder

_BATCH = 250


def evaluate_run(run: Path, location: str | None) -> dict[str, Any]:
    """Accuracy of the network and of each layer on `location`, or on the run's own validation data.

    Raises CheckpointError without a whole checkpoint and DataError for data of other classes.
    """
    folder = RunFolder(run)
    job = job_to_dict(load_job(folder.job))
    newest, _ = checkpoint.newest_valid(folder)
    if newest is None:
        raise CheckpointError(f"{run}: has no checkpoint yet")
    runs = Path(job["runs"])
    datasets = open_datasets(job["data"], runs)
    part = datasets.val if location is None else _foreign(location, datasets.classes)
    if part is None:
        raise DataError(f"{run}: its job names no validation data; give some with --data OUT")
    size, precision = job["data"]["image_size"], job["train"]["precision"]
    layers = network.build(
        job["model"],
        job["objective"],
        input_shape=(job["data"]["channels"], size, size),
        num_classes=len(datasets.classes),
        seed=job["train"]["seed"],
        precision=precision,
        per_layer=job["per_layer"],
    )
    for index, layer in enumerate(layers):
        checkpoint.load_layer(newest, index, layer)
        layer.to(memory_format=torch.channels_last)
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
    normalise = Normalise(job["data"], device, network.DTYPES[precision])
    batches = eval_batches(part, job["data"], normalise, batch_size=_BATCH, replica=0, replicas=1)
    result = evaluate(
        stage,
        batches,
        vote_weights=network.votes(job["model"], len(layers), len(layers)),
        num_classes=len(datasets.classes),
        is_last=True,
        control=Control(1),
    )
    return {
        "run": folder.path.name,
        "step": int(checkpoint.read_state(newest)["step"]),
        "data": str(part.index.folder),
        "samples": result.samples,
        "top1": result.top1,
        "top5": result.top5,
        "layer_top1": list(result.layer_top1.values()),
    }


def _foreign(location: str, classes: list[str]) -> Part:
    from orchestrator.data.index import open_index

    index = open_index(location)
    if list(index.classes) != classes:
        raise DataError(f"{location}: its {len(index.classes)} classes are not the {len(classes)} of the run")
    return Part(index, np.arange(index.num_samples, dtype=np.int64))
