"""Who computes features: this process, processes of this machine, or actors on a Ray cluster."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from orchestrator.data.cached.feature_store import MadeShard
from orchestrator.data.parallel import end_with_parent
from orchestrator.errors import OrchestratorError
from orchestrator.launch.workers.environment import environment_of_workers
from orchestrator.launch.workers.local import device_of
from orchestrator.launch.workers.ray_train import RaySession
from orchestrator.run.device import prepare_torch
from orchestrator.run.features import Extractor, Trunk, Wanted


class LostWorker(OrchestratorError):
    """A worker ended without a word."""

    def __init__(self, why: object) -> None:
        super().__init__(
            f"a worker that computed features is gone: {why}\n"
            "Out of memory is the usual cause: use fewer cluster.workers. Finished shards are kept."
        )


@dataclass(frozen=True)
class Recruit:
    """What a worker is made from, as plain values."""

    job: dict[str, Any]
    num_classes: int
    trunk: Trunk
    weights_from: str | None

    def extractor(self, device: torch.device) -> Extractor:
        prepare_torch(self.job["cluster"], device)
        return Extractor(self.job, self.num_classes, self.trunk, device, self.weights_from)


class Here:
    """This very process."""

    size = 1

    def __init__(self, recruit: Recruit) -> None:
        self._extractor = recruit.extractor(device_of(recruit.job, 0))

    def submit(self, wanted: Wanted, number: int, tick: Callable[[], None]) -> MadeShard:
        return self._extractor.shard(wanted, number, tick)

    def wait(self, flying: Sequence[MadeShard], timeout_s: float) -> Sequence[MadeShard]:
        return list(flying)

    def result(self, ended: MadeShard) -> MadeShard:
        return ended


@contextmanager
def here(recruit: Recruit) -> Iterator[Here]:
    yield Here(recruit)


# --- processes of this machine

_own: list[Extractor] = []


def _begin(recruit: Recruit, places: Any) -> None:
    """Make a spawned process a worker; the driver alone answers signals, and no worker outlives it."""
    end_with_parent()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _own.append(recruit.extractor(device_of(recruit.job, places.get())))


def _shard(wanted: Wanted, number: int) -> MadeShard:
    return _own[0].shard(wanted, number)


class Processes:
    """Workers in processes of their own."""

    def __init__(self, pool: ProcessPoolExecutor, size: int) -> None:
        self._pool, self.size = pool, size

    def submit(self, wanted: Wanted, number: int, tick: Callable[[], None]) -> Future[MadeShard]:
        try:
            return self._pool.submit(_shard, wanted, number)
        except BrokenProcessPool as error:
            raise LostWorker(error) from error

    def wait(self, flying: Sequence[Future[MadeShard]], timeout_s: float) -> Sequence[Future[MadeShard]]:
        return list(wait(flying, timeout_s, FIRST_COMPLETED).done)

    def result(self, ended: Future[MadeShard]) -> MadeShard:
        try:
            return ended.result()
        except BrokenProcessPool as error:
            raise LostWorker(error) from error


@contextmanager
def processes(recruit: Recruit) -> Iterator[Processes]:
    size = recruit.job["cluster"]["workers"]
    spawn = multiprocessing.get_context("spawn")
    places = spawn.SimpleQueue()
    for place in range(size):
        places.put(place)
    with environment_of_workers(recruit.job["cluster"]):
        pool = ProcessPoolExecutor(size, spawn, initializer=_begin, initargs=(recruit, places))
        with pool:
            yield Processes(pool, size)


# --- Ray


class _Actor:
    """A worker on a Ray cluster."""

    def __init__(self, recruit: Recruit) -> None:
        self._extractor = recruit.extractor(torch.device("cuda" if recruit.job["cluster"]["use_gpu"] else "cpu"))

    def shard(self, wanted: Wanted, number: int) -> MadeShard:
        return self._extractor.shard(wanted, number)


class RayActors:
    """Workers as Ray actors, one shard each at a time; only file names and small results travel through Ray."""

    def __init__(self, actors: Sequence[Any]) -> None:
        self.size = len(actors)
        self._idle, self._busy = list(actors), dict[Any, Any]()

    def submit(self, wanted: Wanted, number: int, tick: Callable[[], None]) -> Any:
        actor = self._idle.pop()
        reference = actor.shard.remote(wanted, number)
        self._busy[reference] = actor
        return reference

    def wait(self, flying: Sequence[Any], timeout_s: float) -> Sequence[Any]:
        import ray

        ended, _ = ray.wait(list(flying), num_returns=len(flying), timeout=timeout_s)
        return list(ended)

    def result(self, ended: Any) -> MadeShard:
        import ray

        self._idle.append(self._busy.pop(ended))
        try:
            made: MadeShard = ray.get(ended)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except ray.exceptions.RayError as error:
            raise LostWorker(error) from error
        return made


@contextmanager
def ray_actors(recruit: Recruit) -> Iterator[RayActors]:
    """Actors with the resources of the job's workers, on the Ray that is connected or one that is started for them."""
    cluster = recruit.job["cluster"]
    with RaySession(cluster) as session:
        session.check_resources()
        import ray

        options = {"num_cpus": cluster["cpus_per_worker"], "num_gpus": int(cluster["use_gpu"])}
        made = ray.remote(max_restarts=0, **options)(_Actor)
        actors = [made.remote(recruit) for _ in range(cluster["workers"])]
        try:
            yield RayActors(actors)
        finally:
            for actor in actors:
                ray.kill(actor)


def crew_for(recruit: Recruit) -> Any:
    """The crew that the job's launcher means."""
    cluster = recruit.job["cluster"]
    if cluster["launcher"] == "ray":
        return partial(ray_actors, recruit)
    return partial(here if cluster["workers"] == 1 else processes, recruit)
