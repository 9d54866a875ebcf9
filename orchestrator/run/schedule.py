"""Which step does what: durations, learning rate, who trains, when to save and to evaluate. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hff.schedules import learning_rate
from orchestrator.job.per_layer import of_layer


@dataclass(frozen=True)
class Schedule:
    """The whole course of a run, known before its first step.

    `phases` is 1 for simultaneous training and the number of layers for sequential training, where layer k
    trains alone during phase k and every phase has its own learning-rate curve. `per_layer` has what a layer has
    of its own.
    """

    steps_per_epoch: int
    steps_per_phase: int
    phases: int
    train: dict[str, Any]
    checkpoint: dict[str, Any]
    per_layer: Sequence[Mapping[str, Any] | None] = ()

    @property
    def total_steps(self) -> int:
        return self.steps_per_phase * self.phases

    @property
    def epochs(self) -> int:
        """Epochs begun by the whole run."""
        return -(-self.total_steps // self.steps_per_epoch)

    def epoch(self, step: int) -> int:
        return step // self.steps_per_epoch

    def trained(self, step: int) -> int | None:
        """The only layer that trains at this step; None when all do."""
        if self.train["schedule"] == "simultaneous":
            return None
        return step // self.steps_per_phase

    def depth(self, steps_done: int, layers: int) -> int:
        """Layers that have been trained so far and take part in evaluation."""
        active = self.trained(max(0, steps_done - 1))
        return layers if active is None else min(active + 1, layers)

    def learning_rate(self, step: int, layer: int) -> float:
        warmup = self.train["warmup_steps"] or 0
        if self.train["warmup_epochs"]:
            warmup = round(self.train["warmup_epochs"] * self.steps_per_epoch)
        return learning_rate(
            step % self.steps_per_phase,
            self.steps_per_phase,
            base_lr=of_layer(self.train, self.per_layer, layer)["lr"],
            schedule=self.train["lr_schedule"],
            warmup_steps=warmup,
        )

    def ends_epoch(self, steps_done: int) -> bool:
        """Whether an epoch, perhaps the cut last one, ends with this step."""
        return steps_done % self.steps_per_epoch == 0 or steps_done == self.total_steps

    def saves(self, steps_done: int) -> bool:
        every = self.checkpoint["every_steps"]
        if steps_done == self.total_steps or (every and steps_done % every == 0):
            return True
        period = self.steps_per_epoch * int(self.checkpoint["every_epochs"])
        return steps_done % period == 0

    def evaluates(self, steps_done: int) -> bool:
        """Whether the validation data are classified after this step (the end of the run does it apart)."""
        every = self.steps_per_epoch * int(self.train["eval_every_epochs"])
        return steps_done % every == 0 and steps_done != self.total_steps


def make_schedule(
    train: dict[str, Any],
    checkpoint: dict[str, Any],
    *,
    steps_per_epoch: int,
    layers: int,
    per_layer: Sequence[Mapping[str, Any] | None] = (),
) -> Schedule:
    """Turn the job's duration, given in exactly one unit, into steps for the first `layers` layers."""
    phases = layers if train["schedule"] == "sequential" else 1
    if train["epochs"] is not None:
        steps = int(train["epochs"]) * steps_per_epoch
    elif train["steps"] is not None:
        steps = int(train["steps"])
    else:
        steps = -(-int(train["samples"]) // int(train["global_batch_size"]))
    return Schedule(steps_per_epoch, steps, phases, train, checkpoint, per_layer)
