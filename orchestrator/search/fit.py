"""How many trials a cluster holds at a time: sums over what one trial needs, its driver included."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.errors import JobError
from orchestrator.job.search import SearchJob
from orchestrator.search import tpe

DRIVER_CPUS = 0.1


@dataclass(frozen=True)
class Need:
    """What one trial holds: its driver and its workers."""

    driver_cpus: float
    workers: int
    cpus_per_worker: float
    gpus: int

    @property
    def cpus(self) -> float:
        return round(self.driver_cpus + self.workers * self.cpus_per_worker, 6)

    @property
    def sum(self) -> str:
        """The sum in words."""
        workers = f"{self.workers} x {self.cpus_per_worker:g} for its workers"
        return (
            f"{self.cpus:g} CPU ({self.driver_cpus:g} for its driver + {workers})"
            if self.driver_cpus
            else (f"{self.cpus:g} CPU ({workers})")
        )


def need_of(cluster: Mapping[str, Any]) -> Need:
    """What a trial of a job with this `cluster` section needs.

    Under Ray the driver only waits and reads; with launcher process it is the one that computes.
    """
    return Need(
        driver_cpus=DRIVER_CPUS if cluster["launcher"] == "ray" else 0.0,
        workers=cluster["workers"],
        cpus_per_worker=cluster["cpus_per_worker"],
        gpus=cluster["workers"] if cluster["use_gpu"] else 0,
    )


def capacity(need: Need, cpus: float, gpus: float) -> int:
    """Trials that fit at a time."""
    by_cpu = int((cpus + 1e-6) / need.cpus)
    return min(by_cpu, int((gpus + 1e-6) / need.gpus)) if need.gpus else by_cpu


def concurrency(need: Need, cpus: float, gpus: float, asked: int | str, where: str) -> int:
    """How many trials run at a time in a cluster with so many CPUs and GPUs, which `where` names.

    Raises JobError with the sum when one trial is larger than the cluster or more are asked for than fit.
    """
    fits = capacity(need, cpus, gpus)
    if need.cpus > cpus + 1e-6:
        raise JobError(
            f"base.cluster: one trial must fit into {where}, which has {cpus:g} CPU, got {need.sum}; "
            "use fewer workers or lower base.cluster.cpus_per_worker"
        )
    if need.gpus > gpus + 1e-6:
        raise JobError(
            f"base.cluster: one trial must fit into {where}, which has {gpus:g} GPU, got {need.gpus} for its workers; "
            "use fewer workers"
        )
    if asked == "auto":
        return fits
    if int(asked) > fits:
        raise JobError(
            f"concurrency: must be at most {fits}, got {asked}: a trial needs {need.sum} and {where} has {cpus:g} CPU"
            + (f" and {gpus:g} GPU" if need.gpus else "")
        )
    return int(asked)


def check_offline(search: SearchJob) -> int | None:
    """How many trials this machine runs at a time; None where RAY_ADDRESS names a cluster that only a run can ask.

    Raises JobError when a trial is larger than this machine, or more are asked for at a time than fit.
    """
    if search.sampler == "tpe":
        tpe.require()
    if os.environ.get("RAY_ADDRESS"):
        return None
    # How many GPUs there are is torch's to say, which a check does without.
    return concurrency(
        need_of(search.base["cluster"]), os.cpu_count() or 1, float("inf"), search.concurrency, "this machine"
    )


def trials_line(search: SearchJob) -> str:
    """How many trials a search has and how many of them run at a time. Raises JobError where none fits."""
    at_once = check_offline(search)
    each = " of each layer" if search.strategy == "layerwise" else ""
    where = "" if at_once is None else f", {at_once} at a time on this machine"
    return f"{search.trials_each} trials{each}{where}; a trial needs {need_of(search.base['cluster']).sum}"
