"""The same work on many shards in several processes: nothing is left behind when one of them is killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import TypeVar

from orchestrator.errors import OrchestratorError

T = TypeVar("T")
R = TypeVar("R")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def worth(size: int, *, heavy: bool) -> int:
    """How many processes are worth their start, a second or two, for so many bytes to copy, or to decode (heavy)."""
    return max(1, min(cores(), size // (64 * 2**20 if heavy else 2**30)))


def results(function: Callable[[T], R], tasks: Iterable[T], jobs: int | None) -> Iterator[R]:
    """function(task) of every task, in the order in which they finish; with one job (or None) here, in order.

    Few tasks are taken ahead, so a long list costs no memory. The processes end with this one, however it ends.
    Raises OrchestratorError when one of them is killed, and whatever the function raises.
    """
    if jobs is None or jobs <= 1:
        yield from map(function, tasks)
        return
    waiting: set[Future[R]] = set()
    tasks = iter(tasks)
    # Spawned, not forked: a fork copies the locks of threads that it has not.
    pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"), initializer=end_with_parent)
    try:
        waiting |= {pool.submit(function, task) for task in islice(tasks, jobs + 1)}
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            waiting |= {pool.submit(function, task) for task in islice(tasks, len(done))}
            for future in done:
                yield future.result()
    except BrokenProcessPool:
        raise OrchestratorError(
            f"one of {jobs} processes was killed, most likely for want of memory; the same command goes on from here, "
            "with less memory with a smaller --jobs"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def end_with_parent() -> None:
    """Ctrl-C is the business of who started this process; whose death, which nobody tells, ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, name="parent-watch", daemon=True).start()
