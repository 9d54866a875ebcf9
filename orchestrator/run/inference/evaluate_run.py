"""Classify a data set with the newest checkpoint of a run, in one process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hff.layers import channels_last
from orchestrator.data.stores.remote_index import open_data
from orchestrator.errors import DataError
from orchestrator.pipeline.stage import Stage, StageInput
from orchestrator.run import network
from orchestrator.run.context import Control
from orchestrator.run.datasets import Datasets, Normalise, Part, eval_batches, open_datasets, prepare_embedded
from orchestrator.run.evaluate import evaluate
from orchestrator.run.inference.trained import TrainedRun, trained_run, vote_weights

_BATCH = 250


def evaluate_run(run: Path, location: str | None) -> dict[str, Any]:
    """Accuracy of the network and of each layer on `location`, or on the run's own validation data.

    Raises CheckpointError without a whole checkpoint and DataError for data of other classes.
    """
    trained = trained_run(run)
    part = evaluation_part(trained, datasets_of(trained), location)
    stage = whole_stage(trained)
    result = evaluate(
        stage,
        whole_batches(trained, part, stage.device),
        vote_weights=vote_weights(trained.description, len(stage.layers)),
        num_classes=len(trained.classes),
        is_last=True,
        control=Control(1),
    )
    assert result is not None, "nothing stops these batches"
    return {
        "run": trained.name,
        "step": trained.step,
        "unfinished": trained.unfinished,
        "data": part.index.place,
        "samples": result.samples,
        "held_out": location is None and len(part.subset) < part.index.num_samples,
        "top1": result.top1,
        "top5": result.top5,
        "layer_top1": list(result.layer_top1.values()),
    }


def datasets_of(trained: TrainedRun) -> Datasets:
    """The data that a run was trained on; embedded ones are made where the run was brought from elsewhere."""
    prepare_embedded(trained.job["data"], Path(trained.job["runs"]))
    return open_datasets(trained.job)


def whole_stage(trained: TrainedRun) -> Stage:
    """All layers of a trained network on this machine's CPU, for evaluation."""
    layers = [channels_last(layer) for layer in trained.layers()]
    return Stage(
        first=0,
        layers=layers,
        optimizers=[],
        receiver=None,
        sender=None,
        learning_rate=lambda step, layer: 0.0,
        trained=lambda step: None,
        output_shape=(),
        device=torch.device("cpu"),
    )


def whole_batches(trained: TrainedRun, part: Part, device: torch.device) -> Iterator[StageInput]:
    """Every sample of a part once, as the network of the run wants it."""
    normalise = Normalise(trained.job["data"], device, network.DTYPES[trained.description["precision"]])
    return eval_batches(part, trained.job, normalise, batch_size=_BATCH, replica=0, replicas=1)


def evaluation_part(trained: TrainedRun, datasets: Datasets, location: str | None) -> Part:
    """What a run is evaluated on: `location`, or its own validation data. Raises DataError."""
    part = datasets.val if location is None else _foreign(location, trained)
    if part is None:
        raise DataError(f"{trained.name}: its job names no validation data; give some with --data OUT")
    return part


def _foreign(location: str, trained: TrainedRun) -> Part:
    index, classes = open_data(location, cache=trained.job["data"].get("cache")), trained.classes
    if list(index.classes) != classes:
        raise DataError(f"{location}: its {len(index.classes)} classes are not the {len(classes)} of the run")
    return Part(index, np.arange(index.num_samples, dtype=np.int64))
