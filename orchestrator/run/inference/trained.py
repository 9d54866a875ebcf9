"""The network of a run as its newest checkpoint holds it: the one way from a run folder to something that predicts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hff.layers import LocalLayer
from orchestrator.errors import CheckpointError, DataError
from orchestrator.job.load import load_job
from orchestrator.job.resolved import job_to_dict
from orchestrator.run import checkpoint, network
from orchestrator.run.datasets import open_classes
from orchestrator.run.folder import RunFolder, existing_network, read_json
from orchestrator.run.inference.classifier import Classifier


@dataclass(frozen=True)
class TrainedRun:
    """A run that has a checkpoint. `description` and the files in `weights` are enough to rebuild the network.

    `unfinished` says how far it was trained where that is not to its end.
    """

    name: str
    job: dict[str, Any]
    step: int
    unfinished: str | None
    weights: Path
    description: dict[str, Any]

    @property
    def classes(self) -> list[str]:
        return list(self.description["classes"])

    def layers(self) -> list[LocalLayer]:
        return load_layers(self.description, self.weights)

    def classifier(self) -> Classifier:
        return load_classifier(self.description, self.weights)


def trained_run(run: Path) -> TrainedRun:
    """Read a run folder. Raises CheckpointError when it is none, or has no whole checkpoint."""
    folder = existing_network(run)
    # A run's folder may be a copy of one that lies elsewhere.
    job = job_to_dict(load_job(folder.job)) | {"runs": str(folder.path.resolve().parent)}
    newest, _ = checkpoint.newest_valid(folder)
    if newest is None:
        raise CheckpointError(f"{run}: has no checkpoint yet")
    state = checkpoint.read_state(newest)
    return TrainedRun(
        name=folder.path.resolve().name,
        job=job,
        step=int(state["step"]),
        unfinished=folder.unfinished(int(state["step"])),
        weights=newest,
        description=network.description(job, class_names(folder, job), state),
    )


def class_names(folder: RunFolder, job: Mapping[str, Any]) -> list[str]:
    """The run's classes in order, from its own folder; of runs that did not write them, from their training data."""
    saved = read_json(folder.classes)
    if saved is not None:
        return list(saved)
    try:
        return open_classes(job["data"], Path(job["runs"]))
    except DataError as error:
        raise DataError(f"{folder.path}: the names of its classes are not there: {error}") from error


def load_layers(description: Mapping[str, Any], weights: Path) -> list[LocalLayer]:
    """Rebuild the layers from `description` and the layer_*.safetensors in the folder `weights`.

    Raises CheckpointError when a file is missing or does not fit.
    """
    layers = network.rebuild(description)
    for index, layer in enumerate(layers):
        checkpoint.load_layer(weights, index, layer)
    return layers


def load_classifier(description: Mapping[str, Any], weights: Path) -> Classifier:
    """The whole network in evaluation mode, with its normalisation. Raises CheckpointError as `load_layers` does."""
    layers = load_layers(description, weights)
    return Classifier(layers, vote_weights(description, len(layers)), dict(description["data"]))


def vote_weights(description: Mapping[str, Any], layers: int) -> tuple[float, ...]:
    """The weight of each layer's vote: what the run found, or what its job says."""
    found = description.get("vote_weights")
    return network.votes(description["model"], layers, layers) if found is None else tuple(found)
