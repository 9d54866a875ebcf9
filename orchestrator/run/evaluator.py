"""What one worker does to evaluate the network as it stands, between two steps of training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from orchestrator.pipeline.mesh import Mesh
from orchestrator.pipeline.stage import Stage, StageInput
from orchestrator.run import network
from orchestrator.run.context import Control
from orchestrator.run.datasets import Datasets, Part, Ready, eval_batches
from orchestrator.run.evaluate import Evaluation, evaluate, fit_votes
from orchestrator.run.heartbeat import Heartbeat
from orchestrator.run.schedule import Schedule

if TYPE_CHECKING:
    from orchestrator.run.worker import Assignment


@dataclass
class Evaluator:
    """Evaluates with the weights that count, as all other workers do at the same step.

    `vote_weights` are those that were fitted, None before that and where the job wants none fitted. `stopped` says, on
    every worker, that the run was told to stop and the last evaluation has no result.
    """

    assignment: Assignment
    rank: int
    control: Control
    mesh: Mesh
    stage: Stage
    schedule: Schedule
    datasets: Datasets
    normalise: Ready
    heartbeat: Heartbeat
    vote_weights: list[float] | None = None
    stopped: bool = False

    def fit_votes(self) -> None:
        """Fit the vote weights on images that no layer has learned from, where the job wants it."""
        layers = len(self.assignment.layer_names)
        if self.datasets.vote is None or self.schedule.depth(self.schedule.total_steps, layers) < layers:
            return
        self.heartbeat.state.update(phase="fit votes")
        _, replica = self.mesh.place(self.rank)
        with self.stage.weights_that_count():
            self.vote_weights = fit_votes(
                self.stage,
                self._batches(self.datasets.vote),
                layers=layers,
                replica=replica,
                control=self.control,
            )
        self.stage.take_totals()

    def evaluate(self, part: Part | None, done: int, phase: str, *, mistakes: int = 0) -> Evaluation | None:
        """Classify `part` after `done` steps; None where the job has no such part, or the run was told to stop."""
        if part is None or self.stopped:
            return None
        self.heartbeat.state.update(phase=phase)
        stage_index, _ = self.mesh.place(self.rank)
        layers = len(self.assignment.layer_names)
        depth = self.schedule.depth(done, layers)
        with self.stage.weights_that_count():
            result = evaluate(
                self.stage,
                self._stoppable(self._batches(part)),
                vote_weights=network.votes(self.assignment.job["model"], layers, depth, self.vote_weights),
                num_classes=self.assignment.num_classes,
                is_last=stage_index == self.mesh.stages - 1,
                control=self.control,
                mistakes=mistakes,
            )
        self.stopped = result is None
        self.stage.take_totals()
        self.heartbeat.state.update(phase="train")
        return result

    def _stoppable(self, batches: Iterator[StageInput] | None) -> Iterator[StageInput] | None:
        """Batches of the first stage with its wish to stop, which travels with them to the others."""
        if batches is None:
            return None
        wanted = self.heartbeat.stop_requested
        return (replace(batch, stop=self.stage.sum_over_replicas(0, wanted())[1]) for batch in batches)

    def _batches(self, part: Part) -> Iterator[StageInput] | None:
        stage_index, replica = self.mesh.place(self.rank)
        if stage_index > 0:
            return None
        return eval_batches(
            part,
            self.assignment.job,
            self.normalise,
            batch_size=self.assignment.max_batch,
            replica=replica,
            replicas=self.mesh.replicas[0],
            features=self.assignment.features,
        )
