"""How many workers an elastic job has: decided anew for every attempt, and more when there is room for more."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

from orchestrator.errors import JobError
from orchestrator.job.schema import Cluster
from orchestrator.pipeline.plan import Plan
from orchestrator.run.folder import RunFolder, read_json

_LOOK_S = 5.0
_TELL_S = 60.0
# Looks in a row that must find room: a node that comes and goes is not worth a new start.
_LOOKS = 2
# A new start takes about half a minute: not worth it when less is left to do.
_WORTH_S = 60.0


@runtime_checkable
class Room(Protocol):
    """What an elastic job asks of a cluster; counts are workers of the job."""

    def room(self) -> int:
        """Those that there is room for on the nodes that answer, when none runs."""

    def spare(self) -> int:
        """Those that there is room for beside those that run."""


def elastic_of(cluster: Cluster, session: object, plan_of: Callable[[int], Plan]) -> Elastic | None:
    """What decides on the number of workers; None where it is fixed, or where there is no cluster to ask."""
    if cluster.min_workers is None or not isinstance(session, Room):
        return None
    return Elastic(cluster.min_workers, cluster.workers, plan_of, session)


class Elastic:
    """Plans of a job with any number of workers from `least` to `most`; `plan_of` raises JobError where none fits."""

    def __init__(self, least: int, most: int, plan_of: Callable[[int], Plan], cluster: Room) -> None:
        self._least, self._most = least, most
        self._plan_of, self._cluster = plan_of, cluster
        self.grows = False

    def chosen(self, there: int) -> Plan | None:
        """The plan with most workers of those that are there; None when it is fewer than `least`.

        Raises JobError when there are enough, but no allowed number of them can share out the layers.
        """
        for workers in range(min(there, self._most), self._least - 1, -1):
            try:
                return self._plan_of(workers)
            except JobError:
                if workers == self._least:
                    raise
        return None

    def plan(self, say: Callable[[str], None]) -> Plan:
        """Wait until there is room for `least` workers at least."""
        self.grows = False
        told = -_TELL_S
        while True:
            there = self._cluster.room()
            found = self.chosen(there)
            if found is not None:
                return found
            if time.monotonic() - told >= _TELL_S:
                told = time.monotonic()
                say(f"waiting for workers: the cluster has room for {there}, cluster.workers.min is {self._least}")
            time.sleep(_LOOK_S)

    @contextmanager
    def watching(self, plan: Plan, folder: RunFolder, attempt: int) -> Iterator[None]:
        """While an attempt runs, stop it when a larger one would fit; then `grows` is true."""
        ended = threading.Event()
        watch = threading.Thread(target=self._watch, args=(plan, folder, attempt, ended), name="elastic", daemon=True)
        if plan.workers < self._most:
            watch.start()
        try:
            yield
        finally:
            ended.set()
            if watch.ident is not None:
                watch.join()

    def _watch(self, plan: Plan, folder: RunFolder, attempt: int, ended: threading.Event) -> None:
        pace, seen = Pace(folder, attempt), 0
        while not ended.wait(_LOOK_S):
            worth_it = pace.left_s() > _WORTH_S
            spare = self._cluster.spare() if worth_it else 0
            larger = self.chosen(plan.workers + spare) if spare > 0 else None
            seen = seen + 1 if larger is not None and larger.workers > plan.workers else 0
            if seen >= _LOOKS:
                self.grows = True
                folder.stop_file(attempt).touch()
                return


class Pace:
    """How long an attempt will still train, by its progress between looks."""

    def __init__(self, folder: RunFolder, attempt: int) -> None:
        self._folder, self._attempt = folder, attempt
        self._first: tuple[float, int] | None = None

    def left_s(self) -> float:
        """Seconds of training that are left; 0 as long as nobody can say."""
        progress = read_json(self._folder.progress) or {}
        if progress.get("attempt") != self._attempt or progress.get("phase") != "train":
            return 0.0
        now, step = time.monotonic(), int(progress["step"])
        if self._first is None:
            self._first = now, step
        began, first = self._first
        return (progress["steps_total"] - step) * (now - began) / (step - first) if step > first else 0.0
