"""The training loop of one worker: step, save, evaluate, report. Reads top to bottom."""

from __future__ import annotations

import math
import resource
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from orchestrator.data.loading.order import batch_bounds
from orchestrator.data.loading.stream import refuse_bad
from orchestrator.data.quarantine import read_reasons
from orchestrator.errors import CheckpointError, OrchestratorError
from orchestrator.pipeline.advice import StageTime
from orchestrator.pipeline.mesh import Mesh
from orchestrator.pipeline.stage import NonFiniteLoss, Stage
from orchestrator.run import checkpoint, prepare
from orchestrator.run.context import Context, Control
from orchestrator.run.datasets import Datasets, Ready, TrainFeed, planned_keys, train_stream
from orchestrator.run.evaluator import Evaluator
from orchestrator.run.folder import RunFolder, write_json
from orchestrator.run.heartbeat import Heartbeat
from orchestrator.run.pairs import Pairs
from orchestrator.run.records import events, mistakes
from orchestrator.run.records.ledger import Ledger
from orchestrator.run.records.start import StartClock
from orchestrator.run.records.summary import make_summary
from orchestrator.run.records.tracing import Tracer
from orchestrator.run.records.usage import Usage
from orchestrator.run.saving import Saver
from orchestrator.run.schedule import Schedule

if TYPE_CHECKING:
    from orchestrator.run.worker import Assignment


def _images(keys: list[str]) -> str:
    return f"; images of that batch: {', '.join(keys[:4])}, ... ({len(keys)})" if keys else ""


@dataclass
class Loop:
    """Everything one worker needs for one attempt; `run` is the attempt."""

    assignment: Assignment
    context: Context
    control: Control
    folder: RunFolder
    mesh: Mesh
    stage: Stage
    schedule: Schedule
    datasets: Datasets
    normalise: Ready
    heartbeat: Heartbeat
    saver: Saver
    start: StartClock
    ledger: Ledger = field(default_factory=Ledger)
    samples_seen: int = 0
    train_seconds: float = 0.0
    attempt_seconds: float = 0.0
    attempt_samples: int = 0
    window: float = 0.0
    stage_times: list[StageTime] = field(default_factory=list)
    usage: Usage = field(init=False)
    evaluator: Evaluator = field(init=False)

    def __post_init__(self) -> None:
        self.usage = Usage(self.stage.device)
        self.evaluator = Evaluator(
            self.assignment,
            self.context.rank,
            self.control,
            self.mesh,
            self.stage,
            self.schedule,
            self.datasets,
            self.normalise,
            self.heartbeat,
        )

    def run(self) -> str:
        """Train from the first missing step to the last. Returns 'finished' or 'interrupted'."""
        start = self._restore()
        total = self.schedule.total_steps
        stage_index, replica = self.mesh.place(self.context.rank)
        feed = self._feed(start, replica) if stage_index == 0 else None
        tracer = Tracer(self.assignment, self.mesh, self.context.rank, self.control)
        self.stage.trace = tracer.begin(start, total, self.stage.device)
        self.heartbeat.state.update(step=start, steps_total=total, phase="train")
        if self._leads:
            samples = len(self.datasets.train.subset)
            loader = None if feed is None else feed.loader
            event = events.start(self.assignment.attempt, start, self.schedule, samples, loader)
            cores = {"machine_full": self.assignment.full, "cores": self.assignment.cores}
            self.folder.append_event({**event, **cores, "workers": self.context.world_size})
        self.start.mark("network")
        self.window = time.perf_counter()
        stop = False
        for step in range(start, total):
            began = time.perf_counter()
            self.stage.trace.begin(step)
            self.saver.check()
            if feed is not None:
                with self.stage.trace.span("receive"):
                    batch = feed.next()
                self.stage.times.wait_input_s += time.perf_counter() - began
            else:
                batch = self.stage.receive()
            assert batch.step == step, f"step {step} got the batch of step {batch.step}"
            try:
                stop = self.stage.train_step(batch)
            except NonFiniteLoss as error:
                raise self._diverged(error.layer, f"at step {error.step}", self._keys(error.step)) from error
            except Exception as error:
                if not isinstance(error, OrchestratorError | dist.DistError):  # these are of neighbours
                    error.add_note(f"at step {step}{_images(self._keys(step))}")
                raise
            self.stage.times.wall_s += time.perf_counter() - began
            done = step + 1
            self.heartbeat.state.update(step=done, epoch=self.schedule.epoch(step))
            if step == start and self._leads:
                self.start.mark("first batch")
                self.folder.append_event(events.first_step(done, self.start.seconds))
            ends = self.schedule.ends_epoch(done)
            saves = self.schedule.saves(done) or stop
            if not (ends or saves):
                continue
            parts = self._synchronise(feed, done)
            tracer.collect(self.folder, self.stage.trace)
            self._tick()
            if done == total:
                self.evaluator.fit_votes()
                self.window = time.perf_counter()
            if saves:
                self._save(done, must=stop or done == total)
                self._tick()
            if ends:
                self._end_epoch(done, parts, stop)
                self.window = time.perf_counter()
            if self.evaluator.stopped and not (saves and self.saver.settled()):
                self._save(done, must=True)
            stop = stop or self.evaluator.stopped
            if stop and done < total:
                break
        else:
            stop = False
        if feed is not None:
            feed.close()
        if not stop:
            self._finish(start)
        return self._leave("interrupted" if stop or self.evaluator.stopped else "finished")

    def _tick(self) -> None:
        """Add the time since the last tick to the clocks of the training loop."""
        now = time.perf_counter()
        self.train_seconds += now - self.window
        self.attempt_seconds += now - self.window
        self.window = now

    @property
    def _leads(self) -> bool:
        return self.context.rank == 0

    def _feed(self, start: int, replica: int) -> TrainFeed:
        stream = train_stream(
            self.datasets,
            self.assignment.job,
            replica=replica,
            replicas=self.mesh.replicas[0],
            features=self.assignment.features,
        )
        total = self.schedule.total_steps
        return TrainFeed(stream, self.normalise, start, total, self.heartbeat.stop_requested, self._pairs())

    def _pairs(self) -> Pairs | None:
        job = self.assignment.job
        if job["objective"]["name"] != "ff":
            return None
        samples = self.datasets.train.index.num_samples
        return Pairs(self.assignment.num_classes, samples, job["train"]["seed"], self.schedule.epoch)

    def _restore(self) -> int:
        """Read the run's state; returns the first step to do."""
        source = self.assignment.resume_from
        if source is None or self.assignment.weights_only:
            return 0
        state = checkpoint.read_state(Path(source))
        if state["steps_per_epoch"] != self.schedule.steps_per_epoch:
            raise CheckpointError(
                f"{source}: its epochs have {state['steps_per_epoch']} steps, those of this version "
                f"{self.schedule.steps_per_epoch}; start afresh with --resume never"
            )
        self.samples_seen = state["samples_seen"]
        self.train_seconds = state["train_seconds"]
        self.evaluator.vote_weights = state.get("vote_weights")
        if self._leads:
            try:
                self.ledger = Ledger.restored(state["ledger"], lambda n: self._planned(state["step"], n))
            except ValueError as error:
                raise CheckpointError(f"{source}: {error}") from error
        return int(state["step"])

    def _planned(self, step: int, samples: int) -> list[str]:
        """Keys of the first `samples` samples of the epoch in which `step` lies."""
        return planned_keys(self.datasets.train, self.assignment.job, self.schedule.epoch(step), samples)

    def _synchronise(self, feed: TrainFeed | None, done: int) -> list[dict[str, Any]]:
        """Bring the samples consumed and every worker's sums together; waits for the slowest worker."""
        totals, times = self.stage.take_totals()
        mine = {
            "consumed": [] if feed is None else feed.take_consumed(),
            "first": self.stage.first,
            "loss": [float(t.loss) for t in totals],
            "correct": [int(t.correct) for t in totals],
            "samples": [t.samples for t in totals],
            "scale": self.stage.scales(),
            "layer_s": [t.seconds for t in totals],
            "times": times,
            "stage": self.mesh.place(self.context.rank)[0],
            "remote": self.datasets.remote_counts(),
            "used": self.usage.take(),
            "loader": None if feed is None else feed.loader,
            "skipped": None if feed is None else feed.skipped,
        }
        parts = self.control.gather(mine)
        consumed = sorted((c[0], rank, c[1], c[2]) for rank, p in enumerate(parts) for c in p["consumed"])
        samples = sum(len(indices) for _, _, indices, _ in consumed)
        self.samples_seen += samples
        self.attempt_samples += samples
        if self._leads:
            for _, _, indices, skipped in consumed:
                index = self.datasets.train.index
                self.ledger.consume(index.keys(indices), index.keys(skipped))
            self._refuse_bad()
            if self.schedule.ends_epoch(done):
                self.ledger.end_epoch()
        self._refuse_non_finite(parts, done)
        new = events.stage_times(parts, self.assignment.ranges)
        before = self.stage_times or [StageTime(t.layers, t.replicas) for t in new]
        self.stage_times = [a.plus(b) for a, b in zip(before, new, strict=True)]
        return parts

    def _refuse_bad(self) -> None:
        """Hold the budget for bad images over all replicas and attempts; each stream holds it for its own part."""
        train = self.datasets.train
        known = read_reasons(train.index) if self.ledger.skipped else {}
        bad = [f"key {key}" for key in dict.fromkeys(self.ledger.skipped) if key not in known]
        refuse_bad(bad, self.assignment.job["data"]["bad_sample_budget"], len(train.subset))

    def _refuse_non_finite(self, parts: list[dict[str, Any]], done: int) -> None:
        """Where no step looks, on a GPU: the sums since the last look, before anything is saved."""
        for part in parts:
            for i, loss in enumerate(part["loss"]):
                if not math.isfinite(loss):
                    raise self._diverged(part["first"] + i, f"before step {done}", [])

    def _diverged(self, layer: int, when: str, keys: list[str]) -> OrchestratorError:
        return OrchestratorError(
            f"layer {layer} ({self.assignment.layer_names[layer]}): its loss is not finite {when}{_images(keys)}; "
            "nothing after the last checkpoint is kept: lower train.lr, set train.grad_clip, or go on with another "
            "recipe"
        )

    def _keys(self, step: int) -> list[str]:
        """Keys of the global batch of a step."""
        samples, train = len(self.datasets.train.subset), self.assignment.job["train"]
        bounds = batch_bounds(samples, train["global_batch_size"])
        start, end = bounds[step % self.schedule.steps_per_epoch]
        return self._planned(step, end)[start:]

    def _save(self, done: int, *, must: bool) -> None:
        self.heartbeat.state.update(phase="save")
        state: dict[str, Any] = {
            "step": done,
            "epoch": self.schedule.epoch(done),
            "steps_per_epoch": self.schedule.steps_per_epoch,
            "samples_seen": self.samples_seen,
            "train_seconds": self.train_seconds,
            "attempt": self.assignment.attempt,
            "job_sha256": self.assignment.job_sha256,
            **prepare.index_hashes(self.datasets),
            "ledger": self.ledger.state(),
        }
        if self.evaluator.vote_weights is not None:
            state["vote_weights"] = self.evaluator.vote_weights
        self.saver.save(done, state, must=must)
        self.heartbeat.state.update(phase="train")

    def _end_epoch(self, done: int, parts: list[dict[str, Any]], stop: bool) -> None:
        """Evaluate where due and write the epoch's line."""
        evaluation = None
        if self.schedule.evaluates(done) and not stop:
            evaluation = self.evaluator.evaluate(self.datasets.val, done, "evaluate")
        if not self._leads:
            return
        rate = self.attempt_samples / max(self.attempt_seconds, 1e-9)
        self.heartbeat.state.update(images_per_second=rate)
        event = events.epoch(
            done,
            parts,
            schedule=self.schedule,
            times=events.stage_times(parts, self.assignment.ranges),
            layers=len(self.assignment.layer_names),
            images_per_second=rate,
            train_seconds=self.train_seconds,
            evaluation=evaluation,
        )
        self.folder.append_event(event)
        self.context.report({key: event[key] for key in ("epoch", "step", "val_top1")})

    def _finish(self, start: int) -> None:
        """Evaluate the final weights, hash them and write the summary."""
        total = self.schedule.total_steps
        val = self.evaluator.evaluate(self.datasets.val, total, "evaluate", mistakes=mistakes.SHOWN)
        test = self.evaluator.evaluate(self.datasets.test, total, "test")
        if self.evaluator.stopped:
            return
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if self.stage.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(self.stage.device)
        with self.stage.weights_that_count():
            own = {self.stage.first + i: checkpoint.layer_sha256(layer) for i, layer in enumerate(self.stage.layers)}
        parts = self.control.gather({"hashes": own, "memory": memory})
        if not self._leads:
            return
        hashes = {index: value for part in parts for index, value in part["hashes"].items()}
        summary = make_summary(
            self.assignment,
            self.schedule,
            self.datasets,
            self.ledger,
            run_id=prepare.followed_run_id(self.folder) if self.assignment.run_id_follows else self.assignment.run_id,
            val=val,
            test=test,
            weights_sha256=checkpoint.weights_sha256(v for _, v in sorted(hashes.items())),
            images_per_second=self.attempt_samples / self.attempt_seconds if self.attempt_seconds else None,
            train_seconds=self.train_seconds,
            samples_seen=self.samples_seen,
            efficiency=max((t.fraction(t.work_s) for t in self.stage_times), default=None),
            peak_memory_bytes=[p["memory"] for p in parts],
            start=start,
        )
        if self.evaluator.vote_weights is not None:
            summary["vote_weights"] = self.evaluator.vote_weights
        if self.stage.averages:
            summary["evaluated_weights"] = "averaged"
        if val is not None and self.datasets.val is not None:
            write_json(self.folder.confusion, {"classes": self.datasets.classes, "matrix": val.confusion.tolist()})
            shown = mistakes.described(val.mistakes, self.datasets.val.index, self.datasets.val.subset)
            write_json(self.folder.mistakes, shown)
            self.folder.append_event(events.final(total, val))
        if self.stage_times:
            batch, names = self.assignment.job["train"]["global_batch_size"], self.assignment.layer_names
            self.folder.append_event(events.stages(total, self.stage_times, batch, names, self.assignment.cores))
        write_json(self.folder.summary, summary)

    def _leave(self, status: str) -> str:
        self.control.gather(None)
        return status
