"""The lines of events.jsonl that rank 0 writes and the driver reads: plain values made of what all workers gathered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from orchestrator.data.stores.remote import summed
from orchestrator.pipeline.advice import StageTime, advise
from orchestrator.run.evaluate import Evaluation
from orchestrator.run.schedule import Schedule

_TELLING_S = 10.0
# What one worker gathered since the last look: see `Loop._synchronise`.
Part = dict[str, Any]


def start(
    attempt: int, step: int, schedule: Schedule, samples_per_epoch: int, loader: Mapping[str, Any] | None
) -> dict[str, Any]:
    """An attempt begins at `step`; `loader` makes its batches on rank 0."""
    return {
        "event": "start",
        "attempt": attempt,
        "step": step,
        "steps_total": schedule.total_steps,
        "steps_per_epoch": schedule.steps_per_epoch,
        "epochs": schedule.epochs,
        "samples_per_epoch": samples_per_epoch,
        "loader": None if loader is None else {name: loader[name] for name in ("decoder", "threads")},
    }


def first_step(step: int, seconds: Mapping[str, float]) -> dict[str, Any]:
    """The first step of an attempt is made; `seconds` from the command on, by what they went into, in order."""
    return {"event": "first_step", "step": step, "seconds": {name: round(s, 3) for name, s in seconds.items()}}


def epoch(
    done: int,
    parts: Sequence[Part],
    *,
    schedule: Schedule,
    times: Sequence[StageTime],
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
    # Replicas have the same scales.
    firsts = sorted({part["first"]: part for part in parts}.values(), key=lambda part: part["first"])
    return {
        "event": "epoch",
        "epoch": -(-done // schedule.steps_per_epoch),
        "step": done,
        "images_per_second": images_per_second,
        "train_loss": [x / n if n else None for x, n in zip(loss, samples, strict=True)],
        "scale": [x for part in firsts for x in part["scale"]],
        "train_top1": [x / n if n else None for x, n in zip(correct, samples, strict=True)],
        "val_top1": None if evaluation is None else evaluation.top1,
        "val_top5": None if evaluation is None else evaluation.top5,
        "layer_val_top1": None if evaluation is None else list(evaluation.layer_top1.values()),
        **{key: [fractions(t)[key] for t in times] for key in fractions(times[0])},
        "remote": summed([part["remote"] for part in parts]),
        "loader": _loaded(parts),
        "workers": [part["used"] for part in parts],
        "skipped": dict(sum((part["skipped"] for part in parts if part["skipped"]), Counter())),
        "wall_seconds": train_seconds,
        "learning_rate": schedule.learning_rate(done - 1, schedule.depth(done, layers) - 1),
    }


def _loaded(parts: Sequence[Part]) -> dict[str, float]:
    """What the loaders of all workers did since the start of the attempt: seconds of all their threads together."""
    found = [part["loader"] for part in parts if part["loader"]]
    return {name: sum(loader[name] for loader in found) for name in ("threads", "images", "decode_s", "load_s")}


def final(step: int, evaluation: Evaluation) -> dict[str, Any]:
    """The accuracies of the final weights."""
    return {
        "event": "final",
        "step": step,
        "val_top1": evaluation.top1,
        "val_top5": evaluation.top5,
        "layer_val_top1": list(evaluation.layer_top1.values()),
    }


def stages(
    step: int, times: Sequence[StageTime], batch: int, layer_names: Sequence[str], cores: int | None = None
) -> dict[str, Any]:
    """What the stages of an attempt did with their time, the slow one and its remedy."""
    # In a run of seconds the start weighs more than what comes after it.
    advice = advise(times, batch, layer_names, cores) if times[0].wall_s > _TELLING_S else None
    return {
        "event": "stages",
        "step": step,
        "stages": [{"layers": list(t.layers), "replicas": t.replicas, **fractions(t)} for t in times],
        "slow_stage": None if advice is None else advice.stage,
        "advice": None if advice is None else advice.text,
    }


def fractions(time: StageTime) -> dict[str, float]:
    """Shares of the wall time of a stage; together 1."""
    return {
        "busy_fraction": time.fraction(time.busy_s),
        "wait_input_fraction": time.fraction(time.wait_input_s),
        "wait_output_fraction": time.fraction(time.wait_output_s),
        "all_reduce_fraction": time.fraction(time.all_reduce_s),
    }


def stage_times(parts: Sequence[Part], ranges: Sequence[tuple[int, int]]) -> list[StageTime]:
    """The mean over the replicas of each stage."""
    found = []
    for index, layers in enumerate(ranges):
        own = [part for part in parts if part["stage"] == index]
        times = [part["times"] for part in own]
        found.append(
            StageTime(
                layers=layers,
                replicas=len(own),
                wall_s=fmean(t.wall_s for t in times),
                wait_input_s=fmean(t.wait_input_s for t in times),
                wait_output_s=fmean(t.wait_output_s for t in times),
                all_reduce_s=fmean(t.wait_replicas_s for t in times),
                layer_s=tuple(fmean(values) for values in zip(*(part["layer_s"] for part in own), strict=True)),
            )
        )
    return found
