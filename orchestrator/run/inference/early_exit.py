"""What a finished run's network saves when sure samples leave early: accuracy against compute."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hff.exits import NEVER, Beliefs, beliefs, exit_curve, measure
from orchestrator.errors import JobError
from orchestrator.job.load import job_from_values
from orchestrator.pipeline.stage import Stage
from orchestrator.run.datasets import Part
from orchestrator.run.inference.evaluate_run import datasets_of, evaluation_part, whole_batches, whole_stage
from orchestrator.run.inference.trained import TrainedRun, trained_run, vote_weights
from orchestrator.run.planning import shapes_of

# Accuracy that may be lost on the samples that thresholds are calibrated on.
TOLERANCES = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02)


def early_exit(run: Path, location: str | None) -> dict[str, Any]:
    """The curve of a run on `location`, or on its own validation data; all shares are fractions.

    Thresholds are calibrated on the training images that the run held out to fit its votes. Raises JobError for a
    run without such images or with a single layer, and the errors of `evaluate_run`.
    """
    trained = trained_run(run)
    datasets = datasets_of(trained)
    if datasets.vote is None:
        raise JobError(
            f"{run}: early exit needs training images that no layer has learned from, and this run held out none; "
            "train with model.vote: fitted (it holds out train.vote_from_train of them)"
        )
    stage = whole_stage(trained)
    if len(stage.layers) < 2:
        raise JobError(f"{run}: early exit needs a network of at least 2 layers with heads, this one has 1")
    weights = vote_weights(trained.description, len(stage.layers))
    held = _beliefs(trained, stage, weights, datasets.vote)
    data = _beliefs(trained, stage, weights, evaluation_part(trained, datasets, location))
    costs, whole = _costs(trained, weights)
    full = measure(data, costs, whole, NEVER)
    rows = [
        {
            "tolerated": tolerated,
            # JSON has no infinity.
            "threshold": None if on_data.threshold == NEVER else on_data.threshold,
            "held_out_top1": on_held.top1,
            **{key: value for key, value in asdict(on_data).items() if key != "threshold"},
            "lost": full.top1 - on_data.top1,
        }
        for tolerated, (on_held, on_data) in zip(
            TOLERANCES, exit_curve(held, data, costs, whole, TOLERANCES), strict=True
        )
    ]
    return {"calibrated_on": len(held.right), "samples": len(data.right), "top1": full.top1, "curve": rows}


@torch.no_grad()
def _beliefs(trained: TrainedRun, stage: Stage, weights: tuple[float, ...], part: Part) -> Beliefs:
    confidence: list[Tensor] = []
    right: list[Tensor] = []
    correct = torch.zeros(len(stage.layers), dtype=torch.int64)
    for batch in whole_batches(trained, part, stage.device):
        opinions: list[list[Tensor]] = [[] for _ in stage.layers]
        stage.evaluate(batch, weights, correct, opinions)
        known = beliefs(torch.stack([own[0] for own in opinions], dim=1), weights, batch.target)
        confidence.append(known.confidence)
        right.append(known.right)
    return Beliefs(torch.cat(confidence), torch.cat(right))


def _costs(trained: TrainedRun, weights: tuple[float, ...]) -> tuple[list[float], float]:
    """Arithmetic of each layer with its head, and of the network that asks the heads with a vote alone."""
    job = dict(trained.job)
    if "features" in job:  # a frozen trunk is computed for new images, whatever was kept of those of the training
        job["features"] = {**job["features"], "cache": False}
    shapes = shapes_of(job_from_values(job), len(trained.classes))
    bodies = sum(shape.forward_flops for shape in shapes)
    heads = sum(shape.head_flops for shape, weight in zip(shapes, weights, strict=True) if weight)
    return [float(shape.forward_flops + shape.head_flops) for shape in shapes], float(bodies + heads)
