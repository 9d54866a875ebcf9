"""How long a stop may take: it ends the step, which waits for collectives, and saves."""

from __future__ import annotations

import math

from orchestrator.job.schema import Job
from orchestrator.job.search import SearchJob

_SAVE_S = 60
_TIMEOUT_S = 300.0


def stop_wait_s(job: Job | SearchJob) -> int:
    """Seconds from the wish to stop to the end of the driver, at most."""
    timeout_s = job.cluster.timeout_s if isinstance(job, Job) else _TIMEOUT_S
    return math.ceil(timeout_s) + _SAVE_S
