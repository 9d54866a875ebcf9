"""`orchestrator submit JOB`: the job on a Ray cluster elsewhere, with its log here and its exit code as ours."""

from __future__ import annotations

import asyncio
import os
import secrets
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.errors import EXIT_DONE, EXIT_OTHER, Interrupted, JobError, OrchestratorError, first_line
from orchestrator.job.load import load_any
from orchestrator.job.paths import DIGITS, base_folder
from orchestrator.job.schema import Job
from orchestrator.launch.clusters.package import Package, choose_files, copy_to
from orchestrator.launch.clusters.slurm import run_words
from orchestrator.launch.stop import stop_wait_s
from orchestrator.show.display import WATCHED, Tail, display_for

_END_S = 30.0


@dataclass(frozen=True)
class Submission:
    """All that Ray is told: the command on the cluster, the files for it, and its environment."""

    name: str
    entrypoint: str
    package: Package
    env_vars: dict[str, str]


def plan_submission(
    job_path: str, overrides: Sequence[str], resume: str = "auto", *, watched: bool = False
) -> Submission:
    """Validate the job here and say what would be submitted; nothing is sent.

    The working directory is what relative paths of the job are relative to. Data sets and weights that lie here do
    not travel: the cluster is given their absolute places. `watched`: the driver sends what moving bars here need.
    Raises JobError.
    """
    job = load_any(job_path, overrides)
    root = base_folder(job_path)
    places = _local_files(job) if isinstance(job, Job) else {}
    words = run_words(job_path, [*overrides, *(f"{key}={place}" for key, place in places.items())], resume)
    package = choose_files(root, [Path(job.runs), *map(Path, places.values())])
    if isinstance(job, Job):
        _refuse_left_code(job, package)
    return Submission(
        name=job.name,
        entrypoint=shlex.join(words),
        package=package,
        env_vars={"RAY_JOB_STOP_WAIT_TIME_S": str(stop_wait_s(job)), **({WATCHED: "1"} if watched else {})},
    )


def _local_files(job: Job) -> dict[str, str]:
    """What the job reads and this machine has, data sets and pretrained weights, by key; absolute."""
    named = {f"data.{key}": getattr(job.data, key) for key in ("train", "val", "test")}
    named["model.pretrained"] = getattr(job.model, "pretrained", None)
    return {
        key: place
        for key, place in named.items()
        if isinstance(place, str) and place != DIGITS and os.path.isabs(place) and Path(place).exists()
    }


def _refuse_left_code(job: Job, package: Package) -> None:
    """The user's own code must be among the files that travel."""
    travelling = {str(package.root / name) for name in package.files}
    for key in ("model", "objective"):
        place = getattr(getattr(job, key), "file", None)
        if place is not None and str(Path(place).resolve()) not in travelling:
            raise JobError(
                f"{key}.file: must be a file of {package.root} that is uploaded (not ignored by git), got {place}"
            )


def submit_command(job_path: str, overrides: Sequence[str], *, address: str | None, resume: str, dry_run: bool) -> int:
    """Submit, follow the log to its end and return the driver's exit code."""
    planned = plan_submission(job_path, overrides, resume, watched=sys.stdout.isatty())
    print(submission_text(planned))
    if dry_run:
        print("Nothing was sent (--dry-run).")
        return EXIT_DONE
    client = _client(address)
    submission = _submit(client, planned)
    print(f"Submitted {submission}; stop it with: ray job stop {submission}")
    try:
        asyncio.run(_follow(client, submission))
    except KeyboardInterrupt:
        raise OrchestratorError(
            f"The log is no longer followed; {submission} goes on. Stop it with: ray job stop {submission}"
        ) from None
    return _conclude(client, submission)


def submission_text(planned: Submission) -> str:
    package = planned.package
    environment = " ".join(f"{key}={value}" for key, value in planned.env_vars.items())
    return (
        f"Command      {planned.entrypoint}\n"
        f"Directory    {package.root}: {len(package.files)} files, {package.bytes / 1e6:.2f} MB "
        "(no data, runs, secrets, .git and environments)\n"
        f"Environment  {environment}"
    )


def _client(address: str | None) -> Any:
    """Ray's job client for `address`, else for RAY_API_SERVER_ADDRESS, RAY_ADDRESS or the Ray of this machine."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address is not None:
        os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray prefers the environment to an argument
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient()
    except Exception as error:  # Ray raises ConnectionError, RuntimeError, ValueError and requests' errors alike
        where = os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
        place = f"the Ray cluster at {where}" if where else "a Ray cluster on this machine"
        raise OrchestratorError(
            f"{place} cannot be used: {first_line(error)}\n"
            "Give the address of its dashboard, --address http://HEAD:8265, or set RAY_ADDRESS."
        ) from error


def _submit(client: Any, planned: Submission) -> str:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    with tempfile.TemporaryDirectory() as scratch:
        copy_to(planned.package, Path(scratch))
        try:
            submission = client.submit_job(
                entrypoint=planned.entrypoint,
                submission_id=f"{planned.name}-{stamp}-{secrets.token_hex(2)}",
                runtime_env={"working_dir": scratch, "env_vars": planned.env_vars},
            )
        except Exception as error:  # as above
            raise OrchestratorError(f"Ray did not take the job: {error}") from error
    return str(submission)


async def _follow(client: Any, submission: str) -> None:
    """The driver's log as it grows. A connection that is lost ends it; how the job ended is asked for afterwards."""
    tail = Tail(display_for(sys.stdout))
    try:
        async for text in client.tail_job_logs(submission):
            tail.feed(text)
    except RuntimeError as error:
        tail.feed(f"warning: the log can no longer be followed: {error}\n")
    finally:
        tail.close()


def _conclude(client: Any, submission: str) -> int:
    """The driver's exit code. Raises Interrupted when somebody stopped the job, OrchestratorError without a code."""
    until = time.monotonic() + _END_S
    info = client.get_job_info(submission)
    while not info.status.is_terminal():
        if time.monotonic() > until:
            raise OrchestratorError(
                f"{submission} is still {info.status}; follow it with: ray job logs -f {submission}"
            )
        time.sleep(0.5)
        info = client.get_job_info(submission)
    if info.status == "SUCCEEDED":
        return EXIT_DONE
    if info.status == "STOPPED":
        raise Interrupted(f"{submission} was stopped; submit the same job again to go on from its last checkpoint")
    if info.driver_exit_code is None:
        raise OrchestratorError(f"{submission} failed before its command ran: {info.message}")
    code = int(info.driver_exit_code)
    return code if code > 0 else EXIT_OTHER
