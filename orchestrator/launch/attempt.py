"""One attempt of a run: where it starts from, what its workers get, who starts them, how it ended."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from hff.shapes import LayerShape
from orchestrator.data.cached.features import FeatureFolders
from orchestrator.data.loading.order import steps_per_epoch
from orchestrator.errors import Interrupted, JobError, OrchestratorError
from orchestrator.job.resolved import job_sha256
from orchestrator.launch.beside import followed, stoppable
from orchestrator.launch.drive import Begun, Drive
from orchestrator.launch.restart import Failure
from orchestrator.launch.workers import local
from orchestrator.launch.workers.ray_train import begin_ray
from orchestrator.pipeline.plan import Plan
from orchestrator.run import checkpoint, prepare
from orchestrator.run.context import LocalContext
from orchestrator.run.datasets import Datasets
from orchestrator.run.folder import RunFolder, read_json
from orchestrator.run.planning import own_cores
from orchestrator.run.stores.stored_run import fetch_run
from orchestrator.run.worker import Assignment, first_failure


def next_attempt(drive: Drive, resume: str) -> prepare.Attempt:
    warnings = [] if drive.stored is None else drive.stored.refresh()
    attempt = prepare.next_attempt(drive.folder, resume)
    return replace(attempt, warnings=[*warnings, *attempt.warnings])


def starting_point(drive: Drive, attempt: prepare.Attempt) -> tuple[str | None, bool]:
    """The checkpoint that an attempt starts from, and whether it takes nothing but the weights of it."""
    if attempt.resume_from is not None:
        return str(attempt.resume_from), False
    init_from = drive.job.train.init_from
    if init_from is None:
        return None, False
    if drive.stored is not None:
        fetch_run(f"{drive.stored.store.url}/{init_from.partition('@')[0]}", step=prepare.step_of(init_from))
    return str(prepare.weights_source(Path(drive.job.runs), init_from)), True


def assignment_of(
    drive: Drive,
    attempt: prepare.Attempt,
    plan: Plan,
    datasets: Datasets,
    shapes: tuple[LayerShape, ...],
    features: FeatureFolders | None,
) -> Assignment:
    job = drive.job
    steps, max_batch = steps_per_epoch(len(datasets.train.subset), job.train.global_batch_size)
    resume_from, weights_only = starting_point(drive, attempt)
    return Assignment(
        job=drive.values,
        job_sha256=job_sha256(job),
        run_dir=str(drive.folder.path),
        attempt=attempt.number,
        resume_from=resume_from,
        weights_only=weights_only,
        run_id=attempt.run_id,
        ranges=[stage.layers for stage in plan.stages],
        replicas=plan.replicas,
        micro_batches=plan.micro_batches,
        layer_names=[shape.name for shape in shapes],
        layer_outputs=[tuple(shape.output) for shape in shapes],
        steps_per_epoch=steps,
        max_batch=max_batch,
        num_classes=len(datasets.classes),
        attempt_steps=attempt.earlier_steps,
        git_commit=prepare.git_commit(drive.origin),
        features=features,
        token=uuid.uuid4().hex,
        store=None if drive.stored is None else drive.stored.address(),
        before_launch=drive.clock.seconds,
        launched=time.time(),
        phases=drive.part.phases,
        cores=None if drive.launch else own_cores(job),
    )


def begun_on_ray(drive: Drive, attempt: prepare.Attempt, assignment: Assignment) -> Begun | None:
    """A run's first attempt, whose workers Ray starts while MLflow makes the run; None for any other.

    Where that fails the command ends, its connection to Ray too, and with that the workers.
    """
    if attempt.number > 1 or attempt.resume_from is not None or drive.stored is not None:
        return None
    prepare.record_attempt(drive.folder, attempt, 0, None)
    _, since = drive.folder.read_events()
    return Begun(_on_ray(drive, replace(assignment, run_id_follows=True)), since)


def _on_ray(drive: Drive, assignment: Assignment) -> Callable[[], None]:
    return begin_ray(assignment, storage=str(drive.folder.path / "ray"))


def attempted(drive: Drive, attempt: prepare.Attempt, assignment: Assignment, begun: Begun | None) -> Failure | None:
    """Launch one attempt, or take the one that has begun, and follow it. Returns its failure; raises Interrupted when
    it was stopped."""
    folder = drive.folder
    for warning in attempt.warnings:
        drive.say(f"warning: {warning}")
    first_step = 0
    if attempt.resume_from is not None:
        first_step = int(checkpoint.read_state(attempt.resume_from)["step"])
        drive.say(f"Attempt {attempt.number} goes on from step {first_step}.")
    prepare.record_attempt(folder, attempt, first_step, assignment.run_id)
    uri, run_id = drive.uri, assignment.run_id or ""
    with (
        followed(folder, attempt.number, uri, run_id, drive.part.out, begun.since if begun else None),
        stoppable(folder, attempt.number, drive.hours_left, drive.say) as drive.asked,
    ):
        try:
            with nullcontext() if drive.stored is None else drive.stored.attempt():
                if begun is not None:
                    begun.wait()
                else:
                    _launch(drive, assignment)
        except OrchestratorError as error:
            return _failure(folder, attempt.number, error)
    outcome = read_json(folder.outcome) or {}
    if outcome.get("attempt") != attempt.number:
        return Failure(None, "the workers ended without a result", "", 1, False, ())
    if outcome["status"] == "interrupted":
        raise Interrupted(
            f"{drive.job.name} was stopped after step {outcome['step']} and saved; run the same command again to go on"
        )
    return None


def _launch(drive: Drive, assignment: Assignment) -> None:
    if drive.launch is not None:
        drive.launch(assignment)
    elif drive.job.cluster.launcher == "ray":
        _on_ray(drive, assignment)()
    elif sum(assignment.replicas) == 1:
        local.run_here(assignment, LocalContext())
    else:
        local.run_processes(assignment)


def _failure(folder: RunFolder, attempt: int, error: OrchestratorError) -> Failure:
    """What the workers wrote down, first cause first; the launcher's own words when they could not."""
    step = (read_json(folder.progress) or {}).get("step")
    first, others = first_failure(folder, attempt)
    if first is not None and first["consequence"] and getattr(error, "killed", False):
        others = [first, *others]
        first = None
    seen = tuple(f"worker {r['rank']}: {r['type']}: {r['message'].splitlines()[0]}" for r in others if r["message"])
    stacks = folder.stacks_file(attempt, 0).parent
    if any(stacks.glob(f"attempt-{attempt}-rank-*.stacks")):
        seen += (f"workers that made no step wrote where they were: {stacks}/attempt-{attempt}-rank-*.stacks",)
    if first is None:
        return Failure(step, str(error), "", error.exit_code, isinstance(error, JobError), seen)
    where = f"worker {first['rank']}: " if not first["expected"] else ""
    return Failure(
        step=step,
        message=where + (first["message"] if first["expected"] else f"{first['type']}: {first['message']}"),
        traceback="" if first["expected"] else first["traceback"],
        exit_code=first["exit_code"],
        final=first["exit_code"] in (2, 3, 4),
        others=seen,
    )
