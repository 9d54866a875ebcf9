"""A few processes that form a gloo group, wait for calls, and are ended when one of them hangs."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.common import free_port
from orchestrator.launch.workers.environment import environment_of_workers
from orchestrator.run.device import keep_freed_memory

# Said of the benchmark's own module, which these processes have twice: imported, and as the program that was started.
warnings.filterwarnings("ignore", message=".*found in sys.modules", category=RuntimeWarning)

Calls = Mapping[str, Callable[..., Any]]


class CrewError(RuntimeError):
    """A call that failed or did not come back in time; the processes have been ended."""


class Crew:
    """`make(rank, *arguments)` gives each of `size` processes, one thread each, the calls that it answers.

    They sleep between calls, so that several crews can take turns on the same cores.
    """

    def __init__(self, size: int, make: Callable[..., Calls], *arguments: Any, timeout_s: float = 120.0) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, make.__module__])
        self._timeout_s = timeout_s
        address = f"tcp://127.0.0.1:{free_port()}"
        ends = [context.Pipe() for _ in range(size)]
        self._pipes = [ours for ours, _ in ends]
        self._workers = [
            context.Process(target=_serve, args=(rank, size, address, timeout_s, theirs, make, arguments), daemon=True)
            for rank, (_, theirs) in enumerate(ends)
        ]
        with environment_of_workers({"threads_per_worker": 1}):
            for worker in self._workers:
                worker.start()
        for _, theirs in ends:
            theirs.close()

    def __enter__(self) -> Crew:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def call(self, name: str, *arguments: Any) -> list[Any]:
        """What every process answers, by rank. Raises CrewError, after which the crew is gone."""
        answers = []
        try:
            for pipe in self._pipes:
                pipe.send((name, arguments))
            until = time.monotonic() + self._timeout_s + 10
            for rank, pipe in enumerate(self._pipes):
                if not pipe.poll(max(0.0, until - time.monotonic())):
                    raise CrewError(f"{name} hung: no answer of process {rank} in {self._timeout_s:g} s")
                failure, answer = pipe.recv()
                if failure:
                    raise CrewError(f"{name} failed in process {rank}:\n{failure}")
                answers.append(answer)
        except (EOFError, OSError) as error:
            self.end()
            raise CrewError(f"{name}: a process is gone") from error
        except CrewError:
            self.end()
            raise
        return answers

    def end(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for worker in self._workers:
            worker.join(2)
            if worker.is_alive():
                worker.kill()
                worker.join()


def timed(step: Callable[[], object], steps: int) -> float:
    """Seconds per step in steady state: from the end of the first step, which may fill a pipeline."""
    dist.barrier()
    step()
    began = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - began) / steps


def _serve(
    rank: int,
    size: int,
    address: str,
    timeout_s: float,
    pipe: Any,
    make: Callable[..., Calls],
    arguments: tuple[Any, ...],
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    keep_freed_memory()  # as the workers of a run do; for every method
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=size, timeout=timeout)
    calls: Calls | None = None
    while True:
        try:
            name, values = pipe.recv()
        except (EOFError, ConnectionResetError):
            break
        try:
            calls = make(rank, *arguments) if calls is None else calls
            pipe.send((None, calls[name](*values)))
        except Exception:
            with suppress(BrokenPipeError):
                pipe.send((traceback.format_exc(), None))
            break
    # No clean-up: a group of which one process hangs would not come to an end.
    os._exit(0)
