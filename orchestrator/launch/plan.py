"""`orchestrator plan`: who would own which layers, and how fast that would be, for one number of workers or several."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from orchestrator.errors import EXIT_DONE, JobError
from orchestrator.job.load import SearchJob, job_from_values, load_any, placed
from orchestrator.job.schema import Job
from orchestrator.run.planning import offline, own_cores, plan_for, sequential_note, sharing_note
from orchestrator.search.fit import trials_line
from orchestrator.show.terminal import plan_table, scaling_table


def plan_command(
    path: str,
    overrides: Sequence[str],
    *,
    workers: Sequence[int] | None,
    profile: bool = False,
    price_per_hour: float | None = None,
    json_path: Path | None = None,
) -> int:
    """Print the plan of a job; with several numbers of `workers` a row for each. Returns the exit code.

    `profile` measures the layers on this machine. Raises JobError.
    """
    loaded = load_any(path, overrides)
    jobs = [_job(path, overrides, count, alone=len(workers) == 1) for count in workers] if workers else []
    jobs = jobs or [_job(path, overrides, None, alone=True)]
    with placed(path, overrides, within="base." if isinstance(loaded, SearchJob) else ""):
        known = offline(jobs[0])
        costs = None
        if profile:
            from orchestrator.run.measure import measured_costs

            costs = measured_costs(known.job, known.shapes, known.classes)
        plans = [
            plan_for(
                job.model_copy(update={"data": known.job.data, "model": known.job.model}),
                known.shapes,
                known.samples,
                known.classes,
                costs,
            ).to_json()
            for job in jobs
        ]
    text = json.dumps(plans if len(plans) > 1 else plans[0], indent=1)
    if str(json_path) == "-":
        print(text)
        return EXIT_DONE
    if json_path is not None:
        json_path.write_text(text + "\n", encoding="utf-8")
    if isinstance(loaded, SearchJob):
        print(trials_line(loaded))
    print("Layers measured here." if costs else "Layers estimated from their shapes (--profile measures them).")
    if len(plans) == 1:
        print(plan_table(plans[0], [shape.name for shape in known.shapes], job_name=jobs[0].name))
    in_turn = sequential_note(jobs[0], len(plans[0]["stages"]))
    if in_turn:
        print(in_turn)
    note = sharing_note(max(job.cluster.workers for job in jobs), own_cores(jobs[0]))
    if note:
        print(note)
    if len(plans) > 1 or price_per_hour is not None:
        print(scaling_table(plans, job_name=jobs[0].name, price_per_hour=price_per_hour))
    return EXIT_DONE


def _job(path: str, overrides: Sequence[str], workers: int | None, *, alone: bool) -> Job:
    """The job with another number of workers, whose stages and replicas the planner then chooses.

    Asked for its own number of workers alone, the job keeps its own stages.
    """
    changed = list(overrides)
    if workers is not None:
        loaded = load_any(path, overrides)
        within = "base." if isinstance(loaded, SearchJob) else ""
        cluster = loaded.base["cluster"] if isinstance(loaded, SearchJob) else loaded.cluster.model_dump()
        changed += [f"{within}cluster.workers={workers}"]
        if not (alone and workers == cluster["workers"]):
            for key, free in (("stages", "auto"), ("replicas", "null"), ("layers", "null")):
                if not any(o.startswith(f"{within}cluster.{key}=") for o in overrides):
                    changed += [f"{within}cluster.{key}={free}"]
    job = load_any(path, changed)
    if isinstance(job, SearchJob):
        # What each of its trials looks like.
        job = job_from_values({**job.base, "name": job.name})
    if not isinstance(job, Job):
        raise JobError(f"{path}: must be a job that trains, got kind {job.kind}")
    return job
