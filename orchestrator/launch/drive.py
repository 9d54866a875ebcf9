"""What is known of a run while it is driven."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from orchestrator.job.schema import Job
from orchestrator.run.folder import RunFolder
from orchestrator.run.records import tracking
from orchestrator.run.records.start import StartClock
from orchestrator.run.stores.stored_run import StoredRun
from orchestrator.run.worker import Assignment

Launch = Callable[[Assignment], None]


@dataclass(frozen=True)
class Part:
    """What a run is to something larger, a trial to its search; nothing for a run of its own.

    `tags` go to its MLflow run, what it says goes to `out`, and with the sequential schedule it ends after the
    phases of `phases` layers.
    """

    tags: Mapping[str, str] = field(default_factory=dict)
    out: TextIO | None = None
    phases: int | None = None


@dataclass(frozen=True)
class Begun:
    """An attempt whose workers start already: the wait for its end, and where the run's events ended before it."""

    wait: Callable[[], None]
    since: int


@dataclass
class Drive:
    """What the parts of a drive share. A run in a store (`stored`) is driven through its folder on this machine."""

    job: Job
    values: dict[str, Any]
    folder: RunFolder
    resume: str
    say: Callable[[str], None]
    origin: Path
    launch: Launch | None
    part: Part
    stored: StoredRun | None
    clock: StartClock
    # Set when the run was told to stop: by a signal, or because its hours are over.
    asked: threading.Event = field(default_factory=threading.Event)
    began: float = field(default_factory=time.monotonic)

    @property
    def hours_left(self) -> float | None:
        """What is left of `train.max_hours` for all attempts together; None without that limit."""
        most = self.job.train.max_hours
        return None if most is None else max(0.0, most - (time.monotonic() - self.began) / 3600)

    @property
    def uri(self) -> str:
        """Where the run is tracked."""
        return tracking.resolve_uri(self.job.tracking.uri, Path(self.job.runs))

    @property
    def place(self) -> str:
        """Where the run lies, in the words of its user."""
        return str(self.folder.path) if self.stored is None else self.stored.url
