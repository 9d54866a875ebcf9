"""The driver of one run: decide, announce, launch, follow, conclude."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from hff.shapes import LayerShape
from orchestrator.errors import CheckpointError, Interrupted
from orchestrator.job import paths
from orchestrator.job.resolved import flatten, job_to_dict, job_yaml
from orchestrator.job.schema import Job
from orchestrator.job.show import counted
from orchestrator.launch.attempt import assignment_of, attempted, begun_on_ray, next_attempt, starting_point
from orchestrator.launch.beside import failure_kept, interruptible
from orchestrator.launch.conclude import conclude, unrecorded
from orchestrator.launch.drive import Drive, Launch, Part
from orchestrator.launch.features import features_of
from orchestrator.launch.restart import Failure, next_action
from orchestrator.launch.workers import local
from orchestrator.launch.workers.elastic import elastic_of
from orchestrator.launch.workers.preemption import Preemptions
from orchestrator.launch.workers.ray_train import RaySession
from orchestrator.pipeline.plan import Plan
from orchestrator.run import checkpoint, prepare
from orchestrator.run.datasets import Datasets, open_datasets, prepare_embedded, refuse_large_batch, refuse_quarantined
from orchestrator.run.folder import Lease, RunFolder, write_atomically, write_json
from orchestrator.run.own_code import kept_code
from orchestrator.run.own_head import try_head
from orchestrator.run.planning import (
    backbone_line,
    own_cores,
    plan_for,
    resolved,
    sequential_note,
    shapes_of,
    sharing_note,
)
from orchestrator.run.records import description, tracking
from orchestrator.run.records.start import StartClock
from orchestrator.run.stores.stored_run import StoredRun
from orchestrator.run.superclasses import join_classes
from orchestrator.show.terminal import duration, plan_table


def _told(line: str) -> None:
    print(line, flush=True)


def run_job(
    job: Job,
    *,
    resume: str = "auto",
    summary_path: Path | None = None,
    say: Callable[[str], None] = _told,
    origin: Path | None = None,
    launch: Launch | None = None,
    part: Part | None = None,
    began: float | None = None,
) -> dict[str, Any]:
    """Run a training job to its end and return its summary.

    `resume` is auto, never or must. `origin` is the folder whose git commit is recorded. Raises the errors of
    orchestrator.errors; Interrupted when the run was stopped and can go on. `launch` replaces the launcher that
    the job names, for a group of workers that is there already; it is called once at most. `began` is when the command
    did, by time.monotonic(); default: now.
    """
    job = resolved(job)
    stored = StoredRun(job.runs, job.name, say) if paths.is_store(job.runs) else None
    job = job.model_copy(update={"runs": paths.runs_here(job.runs)})
    drive = Drive(
        job=job,
        values=job_to_dict(job),
        folder=RunFolder(Path(job.runs) / job.name),
        resume=resume,
        say=say,
        origin=origin or Path.cwd(),
        launch=launch,
        part=part or Part(),
        stored=stored,
        clock=StartClock(began),
    )
    if job.cluster.launcher == "process":
        local.refuse_missing_gpu(job)
    with interruptible(drive.folder), Lease(drive.folder), stored or nullcontext():
        summary = _finished(drive) or _drive(drive)
    if summary_path is not None:
        write_json(summary_path, summary)
    return summary


def _finished(drive: Drive) -> dict[str, Any] | None:
    if drive.stored is not None:
        drive.stored.begin(fresh=drive.resume == "never")
    if drive.resume == "never":
        replaced = drive.folder.set_aside()
        if replaced is not None:
            drive.say(f"The earlier run {drive.job.name} is now {replaced.name}.")
        return None
    summary = prepare.finished_summary(drive.folder, drive.values)
    if summary is not None:
        if drive.stored is None and checkpoint.newest_valid(drive.folder)[0] is None:
            raise CheckpointError(
                f"{drive.folder.path}: the run is finished, but it has no checkpoint: bring it back, or train again "
                "with --resume never"
            )
        left = unrecorded(drive.folder)
        if left is not None:
            drive.say(f"Run {drive.job.name} is finished already; MLflow is told what it has not been told yet.")
            return conclude(drive, *left)
        drive.say(
            f"Run {drive.job.name} is finished already ({drive.place}/summary.json). "
            "Use --resume never to run it afresh, or give the job another name."
        )
    return summary


def _drive(drive: Drive) -> dict[str, Any]:
    """Attempts until the run is finished, stopped, or has failed for good."""
    job, folder = drive.job, drive.folder
    tracking.refuse_unwritable(drive.uri)
    # Refuses a damaged or missing checkpoint before anything starts.
    source, weights_only = starting_point(drive, next_attempt(drive, drive.resume))
    backbone = backbone_line(job) if source is None else None
    prepare_embedded(drive.values["data"], Path(job.runs))
    datasets = open_datasets(drive.values)
    refuse_quarantined(datasets)
    refuse_large_batch(datasets, job.train.global_batch_size)
    if source is not None and not weights_only:
        prepare.refuse_other_data(Path(source), datasets)
    shapes = shapes_of(job, len(datasets.classes))
    plan = _plan(drive, shapes, datasets, job.cluster.workers)
    try_head(drive.values["objective"], shapes[-1].head_features, len(datasets.classes))
    folder.path.mkdir(parents=True, exist_ok=True)
    drive.job, written = kept_code(job, folder)
    job, drive.values = drive.job, job_to_dict(drive.job)
    _claim(drive, written)
    write_json(folder.classes, datasets.classes)
    join_classes(drive.values, datasets, folder)
    names = [shape.name for shape in shapes]
    drive.say(plan_table(plan.to_json(), names, job_name=job.name))
    notes = [sequential_note(job, len(plan.stages))]
    notes += [] if drive.launch else [sharing_note(job.cluster.workers, own_cores(job))]
    for note in filter(None, notes):
        drive.say(note)
    if backbone:
        drive.say(backbone)
    folder.append_event({"event": "plan", **plan.to_json(), "layer_names": names})
    failures: list[Failure] = []
    preemptions = Preemptions(folder, job.cluster.max_preemptions if drive.launch is None else 0)
    use_ray = job.cluster.launcher == "ray" and drive.launch is None
    session = RaySession(drive.values["cluster"]) if use_ray else nullcontext()
    # MLflow takes seconds to open, and so does Ray.
    opening = threading.Thread(target=tracking.open_store, args=[drive.uri], name="tracking", daemon=True)
    opening.start()
    drive.clock.mark("job")
    if isinstance(session, RaySession):
        drive.say(session.waiting)
    elif drive.launch is None:
        drive.say(f"Opening MLflow, then starting {counted(job.cluster.workers, 'worker')} on this machine ...")
    with failure_kept(folder), session as ray:
        if isinstance(ray, RaySession):
            ray.check_resources()
            drive.clock.mark("Ray")
            since, workers = duration(drive.clock.total()), counted(job.cluster.workers, "worker")
            drive.say(f"Ray is there {since} after the start; waiting for {workers} ...")
        elastic = elastic_of(job.cluster, ray, lambda workers: _plan(drive, shapes, datasets, workers))
        features = features_of(
            job, datasets, source, say=drive.say, event=folder.append_event, may_make=drive.launch is None
        )
        if features is not None:
            drive.clock.mark("features")
        while True:
            if elastic is not None:
                plan = _announced(drive, plan, elastic.plan(drive.say), names)
            attempt = next_attempt(drive, "auto")
            assignment = assignment_of(drive, attempt, plan, datasets, shapes, features)
            begun = begun_on_ray(drive, attempt, assignment) if isinstance(ray, RaySession) and ray.alone else None
            opening.join()
            attempt = replace(attempt, run_id=_track(drive, attempt, plan, datasets, names))
            drive.clock.mark("MLflow")
            assignment = replace(assignment, run_id=attempt.run_id, launched=time.time())
            try:
                with nullcontext() if elastic is None else elastic.watching(plan, folder, attempt.number):
                    failure = attempted(drive, attempt, assignment, begun)
            except Interrupted:
                grows = elastic is not None and elastic.grows
                again = "There is room for more workers: starting again with them." if grows else None
                again = again or preemptions.again(attempt.number)
                if again is None or drive.asked.is_set():
                    tracking.finish_run(drive.uri, assignment.run_id, "KILLED", [])
                    raise
                drive.say(again)
                drive.clock = StartClock()
                continue
            if failure is None:
                return conclude(drive, assignment.run_id, names)
            again = None if failure.final or drive.asked.is_set() else preemptions.again(attempt.number)
            if again is not None:
                drive.say(f"warning: {failure.headline}; {again}")
                drive.clock = StartClock()
                continue
            failures.append(failure)
            drive.clock = StartClock()
            budget = job.cluster.max_failures if drive.launch is None else 0
            action = next_action(failures, budget, asked=drive.asked.is_set())
            if action.stop:
                tracking.finish_run(drive.uri, assignment.run_id, "FAILED", [])
                raise failure.error(action.why)
            drive.say(f"warning: {failure.headline}; {action.why}")


def _claim(drive: Drive, written: Job) -> None:
    """Write the job down: from here on the files of the run are those of this drive."""
    if drive.stored is None:
        write_atomically(drive.folder.job, job_yaml(written))
        return
    runs = drive.stored.store.url
    write_atomically(drive.folder.job, job_yaml(written.model_copy(update={"runs": runs})))
    drive.stored.claim()


def _plan(drive: Drive, shapes: tuple[LayerShape, ...], datasets: Datasets, workers: int) -> Plan:
    """The plan of the job with so many workers. Raises JobError."""
    cluster = drive.job.cluster.model_copy(update={"workers": workers})
    job = drive.job.model_copy(update={"cluster": cluster})
    return plan_for(job, shapes, len(datasets.train.subset), len(datasets.classes))


def _announced(drive: Drive, before: Plan, plan: Plan, names: list[str]) -> Plan:
    """The plan of the next attempt, said where it is another one."""
    if plan != before:
        drive.say(plan_table(plan.to_json(), names, job_name=drive.job.name))
        drive.folder.append_event({"event": "plan", **plan.to_json(), "layer_names": names})
    return plan


def _track(drive: Drive, attempt: prepare.Attempt, plan: Plan, datasets: Datasets, names: list[str]) -> str:
    """Create the MLflow run, or go on in it. What may differ between attempts is a tag, not a parameter."""
    job = drive.job
    flat = flatten(drive.values)
    varying = ("cluster.", "tracking.", "checkpoint.")
    tags = {f"attempt.{attempt.number}.{key}": flat[key] for key in flat if key.startswith(varying)}
    tags |= {
        "job.kind": job.kind,
        "git.commit": prepare.git_commit(drive.origin) or "unknown",
        "run.folder": drive.place,
        f"attempt.{attempt.number}.stages": str([stage.layers for stage in plan.stages]),
        **drive.part.tags,
    }
    write_json(drive.folder.path / "tracking.json", {"uri": drive.uri})
    return tracking.create_run(
        drive.uri,
        job.tracking.experiment,
        job.name,
        params={key: value for key, value in flat.items() if not key.startswith(varying)},
        tags=tags,
        artifacts=Path(job.runs) / "mlartifacts",
        run_id=attempt.run_id,
        note=description.note(drive.values, {**plan.to_json(), "layer_names": names}, datasets, drive.place),
        datasets=description.dataset_inputs(drive.values, datasets),
    )
