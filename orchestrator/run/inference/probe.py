"""What each layer of a finished run knows: linear probes before and after the sphere, and how its prototypes lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hff.objectives import PrototypeHead
from hff.probe import linear_probe, prototype_similarity, prototype_usage
from hff.randomness import derive_seed
from hff.sphere import normalise
from orchestrator.errors import JobError
from orchestrator.pipeline.stage import Stage
from orchestrator.run.datasets import Part
from orchestrator.run.folder import RunFolder, read_json, write_json
from orchestrator.run.inference.evaluate_run import datasets_of, evaluation_part, whole_batches, whole_stage
from orchestrator.run.inference.trained import TrainedRun, trained_run
from orchestrator.run.records import tracking

# Training images that a probe is fitted on: more change its accuracy little and take memory.
MOST_SAMPLES = 5000
# A picture of more classes than these shows nothing.
MOST_CLASSES = 100


def probe(run: Path, location: str | None) -> dict[str, Any]:
    """Probe every layer on `location`, or on the run's own validation data; accuracies are fractions.

    Of the run's own data the answer is kept as RUN/probe.json, for the report, and goes to MLflow. Raises JobError for
    objective ff and the errors of `evaluate_run`.
    """
    trained = trained_run(run)
    if trained.job["objective"]["name"] == "ff":
        raise JobError(f"{run}: a layer of objective ff has an output for each class of an image, not one to probe")
    datasets = datasets_of(trained)
    part, stage = evaluation_part(trained, datasets, location), whole_stage(trained)
    fitted_N, fitted = _features(trained, stage, _some(datasets.train))
    target_N, features = _features(trained, stage, part)
    layers = []
    for layer, own, other in zip(stage.layers, fitted, features, strict=True):
        with torch.no_grad():
            right_N = layer.head.logits(other).argmax(dim=1) == target_N
        rows = {"raw": (own, other), "normalised": (normalise(own), normalise(other))}
        found = {
            f"probe_{name}": _share(linear_probe(a, fitted_N, b, len(trained.classes)) == target_N)
            for name, (a, b) in rows.items()
        }
        layers.append(
            {"name": layer.name, "top1": _share(right_N), **found, **_prototypes(layer.head, other, target_N)}
        )
    result = {"step": trained.step, "samples": len(target_N), "fitted_on": len(fitted_N), "layers": layers}
    if location is None:
        write_json(RunFolder(run).probe, result)
    return result


def track(run: Path, result: Mapping[str, Any]) -> str | None:
    """Add the probes to the run's metrics in MLflow, where it has a run there; returns a warning instead of raising."""
    trained, history = trained_run(run), read_json(RunFolder(run).attempts) or []
    if not history or not history[-1]["run_id"]:
        return None
    metrics = {
        f"layer/{i:02d}/{key}": float(layer[key])
        for i, layer in enumerate(result["layers"])
        for key in ("probe_raw", "probe_normalised", "scale", "idle_prototypes", "greatest_similarity")
        if layer.get(key) is not None
    }
    uri = tracking.resolve_uri(trained.job["tracking"]["uri"], Path(trained.job["runs"]))
    return tracking.note(uri, history[-1]["run_id"], metrics=metrics)


def _share(right: Tensor) -> float:
    return float(right.double().mean())


def _some(part: Part) -> Part:
    """At most MOST_SAMPLES of a part, the same in every call."""
    random = np.random.Generator(np.random.PCG64(derive_seed(0, "probe")))
    return Part(part.index, np.sort(random.permutation(part.subset)[:MOST_SAMPLES]))


@torch.no_grad()
def _features(trained: TrainedRun, stage: Stage, part: Part) -> tuple[Tensor, list[Tensor]]:
    """Labels (N,) and what the head of each layer sees, (N, D)."""
    targets: list[Tensor] = []
    seen: list[list[Tensor]] = [[] for _ in stage.layers]
    for batch in whole_batches(trained, part, stage.device):
        targets.append(batch.target.clone())
        x = batch.x
        for layer, own in zip(stage.layers, seen, strict=True):
            layer.eval()
            x = layer(x)
            own.append(layer.head.flat(x))
    return torch.cat(targets), [torch.cat(parts) for parts in seen]


@torch.no_grad()
def _prototypes(head: object, feature_ND: Tensor, target_N: Tensor) -> dict[str, Any]:
    """Scale, similarities and usage of a layer's prototypes; nothing of other heads."""
    if not isinstance(head, PrototypeHead):
        return {}
    proto_CMD = head.unit_prototypes()
    usage_CM = prototype_usage(normalise(feature_ND).to(proto_CMD.dtype), target_N, proto_CMD)
    similarity_CC = prototype_similarity(proto_CMD)
    classes = len(similarity_CC)
    apart = similarity_CC[~torch.eye(classes, dtype=torch.bool)]
    return {
        "scale": float(head.scale),
        "greatest_similarity": float(apart.max()),
        "mean_similarity": float(apart.mean()),
        "prototypes": usage_CM.numel(),
        "idle_prototypes": int((usage_CM == 0).sum()),
        "usage": _lists(usage_CM) if classes <= MOST_CLASSES else None,
        "similarity": _lists(similarity_CC, 4) if classes <= MOST_CLASSES else None,
    }


def _lists(matrix: Tensor, digits: int = 0) -> Sequence[Sequence[float]]:
    return [[round(value, digits) if digits else value for value in row] for row in matrix.tolist()]
