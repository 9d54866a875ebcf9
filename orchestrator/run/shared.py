"""Whether all workers see the run's folder: one that does not would write its layers where nobody finds them."""

from __future__ import annotations

import socket
import time
from pathlib import Path

from orchestrator.errors import JobError
from orchestrator.run.context import Control
from orchestrator.run.folder import RunFolder

# Network file systems may show a new file late.
_PATIENCE_S = 10.0


def refuse_unshared(folder: RunFolder, token: str, rank: int, control: Control) -> None:
    """Raise JobError, on every worker, where one of them does not see what rank 0 and the driver write; all call this.

    `token` is unique to the attempt.
    """
    mark = folder.shared_file(token)
    if rank == 0:
        folder.path.mkdir(parents=True, exist_ok=True)
        mark.touch()
    control.gather(None)
    sees = _appears(mark) and folder.job.exists()
    hosts = control.gather(None if sees else socket.gethostname())
    if rank == 0:
        mark.unlink(missing_ok=True)
    blind = [f"worker {number} on {host}" for number, host in enumerate(hosts) if host is not None]
    if blind:
        raise JobError(
            f"runs: must be storage that all nodes share, got {folder.path.parent}, where {', '.join(blind)} cannot "
            "see the run; use a folder that all nodes mount at the same place, or a store (s3://BUCKET/PATH)"
        )


def _appears(path: Path) -> bool:
    until = time.monotonic() + _PATIENCE_S
    while not path.exists():
        if time.monotonic() > until:
            return False
        time.sleep(0.2)
    return True
