"""How many nodes of which size a job needs: the numbers that every kind of cluster is asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass

from orchestrator.errors import JobError
from orchestrator.job.schema import Job
from orchestrator.job.search import SearchJob
from orchestrator.job.site import Site
from orchestrator.search.fit import need_of


@dataclass(frozen=True)
class Shape:
    """Equal nodes that together hold the job's workers, no more and no less."""

    nodes: int
    workers_per_node: int
    cpus: int
    gpus: int
    memory_gib: int


def shape_of(job: Job | SearchJob, site: Site) -> Shape:
    """Nodes for all workers of a run, or for the trials that a search runs at a time (one with `concurrency: auto`).

    Every node has the same number of workers: the most that divide them all and fit by `site.workers_per_node`.
    Raises JobError for a job that would not use them.
    """
    cluster = job.base["cluster"] if isinstance(job, SearchJob) else job.cluster.model_dump(mode="json")
    within = "base." if isinstance(job, SearchJob) else ""
    if cluster["launcher"] != "ray":
        key = f"{within}cluster.launcher"
        text = f"must be ray on a cluster, got {cluster['launcher']!r} (add --set {key}=ray)"
        raise JobError(findings=[(key, text)])
    need = need_of(cluster)
    trials = 1
    driver_cpus = 0.0  # the driver of a run asks Ray for nothing
    if isinstance(job, SearchJob):
        trials = 1 if job.concurrency == "auto" else job.concurrency
        driver_cpus = need.driver_cpus * trials
    workers = need.workers * trials
    each = max(n for n in range(1, min(workers, site.workers_per_node) + 1) if workers % n == 0)
    return Shape(
        nodes=workers // each,
        workers_per_node=each,
        cpus=math.ceil(round(each * need.cpus_per_worker + driver_cpus, 6)),
        gpus=each if need.gpus else 0,
        memory_gib=each * site.memory_gib_per_worker + site.shared_memory_gib,
    )
