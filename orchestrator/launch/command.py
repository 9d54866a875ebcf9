"""`orchestrator run`: one job, or one per seed, on whatever started this process."""

from __future__ import annotations

import json
import statistics
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.errors import EXIT_DONE, JobError
from orchestrator.job.load import Job, load_any, load_job, placed
from orchestrator.job.search import SearchJob
from orchestrator.job.show import counted
from orchestrator.run.folder import write_json
from orchestrator.run.records.start import without_collector


def run_command(
    job_path: str,
    *,
    overrides: Sequence[str],
    seeds: Sequence[int] | None,
    summary_path: Path | None,
    resume: str,
    began: float | None = None,
) -> int:
    """Run the job; returns the exit code. Errors are raised. `began` is when the command did, by time.monotonic()."""
    job = load_any(job_path, overrides, tell=print)
    # Libraries warn about their own affairs; the user of a job sees our words only.
    warnings.simplefilter("ignore")
    with without_collector():
        from orchestrator.launch.workers.local import torchrun_rank

    if isinstance(job, SearchJob) and seeds is not None:
        raise JobError("--seeds: not with kind search; make train.seed a path of its space or search once per seed")
    if torchrun_rank() is not None:
        with placed(job_path, overrides):
            _run_under_torchrun(job, seeds, resume=resume, summary_path=summary_path, origin=_origin(job_path))
        return EXIT_DONE
    if seeds is None:
        run_loaded(job, job_path, overrides, resume=resume, summary_path=summary_path, began=began)
        return EXIT_DONE
    summaries = []
    for seed in seeds:
        more = [*overrides, f"train.seed={seed}", f"name={job.name}-seed-{seed}"]
        summaries.append(run_loaded(load_job(job_path, more), job_path, more, resume=resume))
    result = over_seeds(summaries)
    print(seeds_line(result))
    if summary_path is not None:
        write_json(summary_path, result)
    return EXIT_DONE


def run_loaded(
    job: Job | SearchJob,
    job_path: str,
    overrides: Sequence[str],
    *,
    resume: str,
    summary_path: Path | None = None,
    began: float | None = None,
) -> dict[str, Any]:
    """Run a job that was loaded from `job_path` with `overrides` to its end, its controls too; returns its summary."""
    origin = _origin(job_path)
    with placed(job_path, overrides, within="base." if isinstance(job, SearchJob) else ""):
        if isinstance(job, SearchJob):
            from orchestrator.launch.searches.search import run_search

            return run_search(job, resume=resume, summary_path=summary_path, origin=origin)
        return _run_with_controls(job, resume=resume, summary_path=summary_path, origin=origin, began=began)


def run_file(job_path: str, changes: Mapping[str, Any], *, resume: str) -> dict[str, Any]:
    """`orchestrator.run_job`: no process of torchrun, no warnings of libraries, values in place of words."""
    overrides = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
    job = load_any(job_path, overrides, tell=print)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return run_loaded(job, job_path, overrides, resume=resume)


def _origin(job_path: str) -> Path:
    return Path(job_path).absolute().parent


def _run_under_torchrun(
    job: Job | SearchJob, seeds: Sequence[int] | None, *, resume: str, summary_path: Path | None, origin: Path
) -> None:
    from orchestrator.launch.controls import wanted_controls
    from orchestrator.launch.workers.torchrun import run_under_torchrun

    if isinstance(job, SearchJob):
        raise JobError("kind: search places its own workers; run it without torchrun")
    if seeds is not None:
        raise JobError("--seeds: not under torchrun; start one torchrun per seed with --set train.seed=N")
    if wanted_controls(job):
        raise JobError("controls: not under torchrun; leave them out, or use cluster.launcher process or ray")
    run_under_torchrun(job, resume=resume, summary_path=summary_path, origin=origin)


def _run_with_controls(
    job: Job, *, resume: str, summary_path: Path | None, origin: Path, began: float | None
) -> dict[str, Any]:
    """The run of a job, then those of its controls; returns the summary of the first with all results."""
    with without_collector():
        from orchestrator.launch.controls import run_controls, wanted_controls
        from orchestrator.launch.driver import run_job

    wanted_controls(job)  # refuses what cannot be made before anything starts
    summary = run_job(job, resume=resume, summary_path=summary_path, origin=origin, began=began)
    again = "auto" if resume == "must" else resume
    summary = run_controls(job, summary, lambda one: run_job(one, resume=again, origin=origin), print)
    if summary_path is not None:
        write_json(summary_path, summary)
    return summary


def over_seeds(summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and sample standard deviation of the accuracies of runs that differ in their seed."""
    result: dict[str, Any] = {"seeds": [s["seed"] for s in summaries], "runs": list(summaries)}
    for metric in ("val_top1", "val_top5", "test_top1", "test_top5"):
        values = [s[metric] for s in summaries if s[metric] is not None]
        if len(values) == len(summaries):
            spread = statistics.stdev(values) if len(values) > 1 else None
            result[metric] = {"mean": statistics.fmean(values), "deviation": spread}
    return result


def seeds_line(result: dict[str, Any]) -> str:
    parts = []
    for metric in ("val_top1", "test_top1"):
        if metric in result:
            spread = result[metric]["deviation"]
            note = "" if spread is None else f" +- {spread:.4f}"
            parts.append(f"{metric} {result[metric]['mean']:.4f}{note}")
    return f"{counted(len(result['seeds']), 'seed')}: " + ", ".join(parts)


def eval_command(
    run: Path,
    location: str | None,
    json_path: Path | None,
    *,
    with_exits: bool = False,
    with_probes: bool = False,
) -> int:
    """Classify a data set with the newest checkpoint of a run; returns the exit code.

    `with_exits` adds what is saved when sure samples leave early, `with_probes` what each layer knows.
    """
    warnings.simplefilter("ignore")
    from orchestrator.run.inference.early_exit import early_exit
    from orchestrator.run.inference.evaluate_run import evaluate_run
    from orchestrator.run.inference.probe import probe, track
    from orchestrator.show.exits import exits_table
    from orchestrator.show.probes import probes_table
    from orchestrator.show.terminal import percent

    # First: they refuse runs that cannot have them before anything is classified.
    exits = early_exit(run, location) if with_exits else None
    probes = probe(run, location) if with_probes else None
    more = {name: value for name, value in (("early_exit", exits), ("probe", probes)) if value is not None}
    result = evaluate_run(run, location) | more
    part = "held out of" if result["held_out"] else "of"
    print(f"{run.name} at step {result['step']}: {counted(result['samples'], 'image')} {part} {result['data']}")
    if result["unfinished"]:
        print(result["unfinished"])
    for index, top1 in enumerate(result["layer_top1"]):
        print(f"  layer {index:>2}  top-1 {percent(top1)}")
    print(f"  network   top-1 {percent(result['top1'])}, top-5 {percent(result['top5'])}")
    if exits is not None:
        print(exits_table(exits))
    if probes is not None:
        print(probes_table(probes))
        warning = track(run, probes) if location is None else None
        if warning:
            print(warning)
    if json_path is not None:
        write_json(json_path, result)
    return EXIT_DONE
