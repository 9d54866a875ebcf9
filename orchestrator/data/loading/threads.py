"""How many threads make batches fastest here, by trying; for `data.loader_threads: auto`."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.loading.stream import Source
from orchestrator.data.parallel import cores

_SAMPLES = 32
_ROUNDS = 3
# More threads have to be worth it: they take cores away from training.
_GAIN = 1.1

_answers: dict[str, int] = {}


def loader_threads(wanted: int | Literal["auto"], source: Source, subset: NDArray[np.int64]) -> int:
    """`wanted`, or the number of threads that `auto` is here: measured once in a process, half a second.

    Decides neither order nor pixels. What else keeps the cores busy at that moment, such as other workers of the
    same machine, lowers the answer, as it should.
    """
    if wanted != "auto":
        return wanted
    kind = type(source).__name__
    if kind not in _answers:
        _answers[kind] = measured(source, subset[:_SAMPLES], cores())
    return _answers[kind]


def measured(source: Source, indices: NDArray[np.int64], most: int) -> int:
    """The fewest threads, 1, 2, 4, ... up to `most`, of which twice as many are hardly faster."""
    source.batch(indices)  # opens shards, loads the decoder
    threads, best = 1, _rate(source, indices, 1)
    while threads < most:
        more = min(2 * threads, most)
        found = _rate(source, indices, more)
        if found < _GAIN * best:
            break
        threads, best = more, found
    return threads


def _rate(source: Source, indices: NDArray[np.int64], threads: int) -> float:
    """Batches a second that so many threads make, in the best of some rounds."""
    seconds = []
    with ThreadPoolExecutor(threads, thread_name_prefix="loader") as pool:
        for _ in range(_ROUNDS):
            began = time.perf_counter()
            for made in [pool.submit(source.batch, indices) for _ in range(threads)]:
                made.result()
            seconds.append(time.perf_counter() - began)
    return threads / max(min(seconds), 1e-9)
