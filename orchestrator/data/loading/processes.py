"""Batches made by processes, by torch's DataLoader, for where the interpreter's lock holds training up."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterator
from functools import cached_property
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, Dataset

from orchestrator.data.loading.stream import Batch, Source, Task, timed
from orchestrator.data.parallel import end_with_parent
from orchestrator.errors import DataError


class _Made(Dataset[Any]):
    """Batches by their task. `make_source` is called once in each process, so it must be picklable."""

    def __init__(self, make_source: Callable[[], Source]) -> None:
        self._make_source = make_source

    @cached_property
    def _source(self) -> Source:
        return self._make_source()

    def __getitem__(self, task: Task) -> Batch | DataError:
        try:
            return timed(self._source, *task)
        except DataError as error:  # as a value: DataLoader would put a traceback into its text
            return error


def _begin(worker: int) -> None:
    # torch's own watch lets a process wait for ever that has more to hand over than a dead trainer takes.
    end_with_parent()
    torch.set_num_threads(1)


def _as_it_is(batch: Any) -> Any:
    return batch


def in_processes(
    make_source: Callable[[], Source], tasks: Iterator[Task], processes: int, prefetch: int
) -> Generator[Batch, None, None]:
    """The batches of `tasks` in their order, up to `prefetch` of them being made ahead; the processes end with it."""
    with warnings.catch_warnings():
        # How many processes is the job's affair, though there be fewer cores.
        warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
        loader = DataLoader(
            _Made(make_source),
            sampler=cast(Any, tasks),
            batch_size=None,
            num_workers=processes,
            prefetch_factor=max(1, -(-prefetch // processes)),
            collate_fn=_as_it_is,
            worker_init_fn=_begin,
            # Not fork: the process that trains has threads.
            multiprocessing_context="spawn",
        )
        batches = iter(loader)
    for batch in batches:
        if isinstance(batch, DataError):
            raise batch
        yield batch
