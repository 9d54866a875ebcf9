"""Distributed training of greedy, layer-local networks: jobs, data, pipeline, runs, launchers, pages."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

__version__ = "0.2.0"
__all__ = ["__version__", "run_job"]


def run_job(
    job: str | os.PathLike[str],
    changes: Mapping[str, Any] | None = None,
    *,
    resume: Literal["auto", "never", "must"] = "auto",
) -> dict[str, Any]:
    """Run a job file of any kind to its end, as `orchestrator run` does, and return what its summary.json holds.

    `changes` are values by their paths, as with `--set`: {"train.lr": 1e-3, "cluster.launcher": "process"}. A run of
    that name that is unfinished goes on, a finished one gives its summary, unless `resume` says otherwise. Raises
    JobError, DataError or CheckpointError of orchestrator.errors, with what a user is told on the command line, and
    Interrupted when the run was stopped and saved.
    """
    from orchestrator.launch.command import run_file

    return run_file(os.fspath(job), changes or {}, resume=resume)
