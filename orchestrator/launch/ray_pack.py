"""Shards of `data pack --ray`, written by the workers of a Ray cluster: the same tasks, the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TypeVar

from orchestrator.errors import OrchestratorError
from orchestrator.launch.workers.ray_train import RaySession

T = TypeVar("T")
R = TypeVar("R")


def results_on_ray(function: Callable[[T], R], tasks: Iterable[T], jobs: int | None) -> Iterator[R]:
    """function(task) of every task, in the order in which they finish, on `jobs` cores of the cluster (None: all).

    The cluster is the one at RAY_ADDRESS, else a Ray of our own on this machine. A task whose worker is lost is given
    to another one. Raises OrchestratorError when that happens too often, and whatever the function raises.
    """
    with RaySession(None) as session:
        import ray

        print(session.where, flush=True)
        jobs = jobs or max(1, int(ray.cluster_resources().get("CPU", 1)))
        begin = ray.remote(num_cpus=1, max_retries=3)(function)
        tasks = iter(tasks)
        flying = [begin.remote(task) for task in islice(tasks, jobs)]
        while flying:
            (ended, *_), flying = ray.wait(flying)
            flying += [begin.remote(task) for task in islice(tasks, 1)]
            try:
                result = ray.get(ended)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except ray.exceptions.RayError as error:
                raise OrchestratorError(
                    f"workers were lost several times: {error}\nthe same command goes on with the shards that are there"
                ) from error
            yield result
