"""`orchestrator check`: what is wrong with a job file, and what is not there yet, offline and without torch."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.data.agree import look
from orchestrator.errors import EXIT_DONE, DataError
from orchestrator.job.load import SearchJob, job_to_dict, load_any, locate
from orchestrator.search.fit import trials_line


def check_command(path: str, overrides: Sequence[str]) -> int:
    """Say that a job is valid, and which of its local data are not there; returns the exit code.

    Raises JobError for a job that is not valid, DataError for an index that is not what the job states.
    """
    job = load_any(path, overrides, tell=print)
    within, data = ("base.", job.base["data"]) if isinstance(job, SearchJob) else ("", job_to_dict(job)["data"])
    where, found = locate(path, overrides), look(data)

    def placed(key: str) -> str:
        return where(within + key)

    if found.wrong:
        raise DataError("\n".join(f"{placed(key)}: {text}" for key, text in found.wrong))
    trials = trials_line(job) if isinstance(job, SearchJob) else ""
    print(f"{path}: ok: {job.kind} {job.name}, runs in {job.runs}/{job.name}")
    if trials:
        print(trials)
    for key, text in found.missing:
        print(f"note: {placed(key)}: {text}")
    return EXIT_DONE
