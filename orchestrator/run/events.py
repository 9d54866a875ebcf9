"""The lines of events.jsonl that rank 0 writes and the driver reads: plain values made of what all workers gathered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from orchestrator.data.remote import summed
from orchestrator.pipeline.stage import StageTimes
from orchestrator.run.evaluate import Evaluation
from orchestrator.run.schedule import Schedule

# What one worker gathered since the last look: see `Loop._synchronise`.
Part = dict[str, Any]


def start(attempt: int, step: int, schedule: Schedule, samples_per_epoch: int) -> dict[str, Any]:
    """An attempt begins at `step`."""
    return {
        "event": "start",
        "attempt": attempt,
        "step": step,
        "steps_total": schedule.total_steps,
        "steps_per_epoch": schedule.steps_per_epoch,
        "epochs": schedule.epochs,
        "samples_per_epoch": samples_per_epoch,
    }


def epoch(
    done: int,
    parts: Sequence[Part],
    *,
    schedule: Schedule,
    stages: int,
    layers: int,
    images_per_second: float,
    train_seconds: float,
    evaluation: Evaluation | None,
) -> dict[str, Any]:
    """An epoch ended after `done` steps; losses and accuracies are means over its samples, by layer."""
    loss, correct, samples = ([0.0] * layers for _ in range(3))
    for part in parts:
        for i in range(len(part["loss"])):
            loss[part["first"] + i] += part["loss"][i]
            correct[part["first"] + i] += part["correct"][i]
            samples[part["first"] + i] += part["samples"][i]
    return {
        "event": "epoch",
        "epoch": -(-done // schedule.steps_per_epoch),
        "step": done,
        "images_per_second": images_per_second,
        "train_loss": [x / n if n else None for x, n in zip(loss, samples, strict=True)],
        "train_top1": [x / n if n else None for x, n in zip(correct, samples, strict=True)],
        "val_top1": None if evaluation is None else evaluation.top1,
        "val_top5": None if evaluation is None else evaluation.top5,
        "layer_val_top1": None if evaluation is None else list(evaluation.layer_top1.values()),
        "busy_fraction": per_stage(parts, stages, lambda t: t.busy_s),
        "wait_input_fraction": per_stage(parts, stages, lambda t: t.wait_input_s),
        "remote": summed([part["remote"] for part in parts]),
        "wall_seconds": train_seconds,
        "learning_rate": schedule.learning_rate(done - 1, schedule.depth(done, layers) - 1),
    }


def final(step: int, evaluation: Evaluation) -> dict[str, Any]:
    """The accuracies of the final weights."""
    return {
        "event": "final",
        "step": step,
        "val_top1": evaluation.top1,
        "val_top5": evaluation.top5,
        "layer_val_top1": list(evaluation.layer_top1.values()),
    }


def per_stage(parts: Sequence[Part], stages: int, seconds: Callable[[StageTimes], float]) -> list[float]:
    """Largest fraction of the wall time over the replicas of each stage."""
    fractions = [0.0] * stages
    for part in parts:
        times = part["times"]
        share = seconds(times) / max(times.wall_s, 1e-9)
        fractions[part["stage"]] = max(fractions[part["stage"]], share)
    return fractions
