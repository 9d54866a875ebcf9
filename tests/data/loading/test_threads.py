"""`loader_threads: auto` is what was measured: as many threads as help, and no more."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch

from orchestrator.data.index import Index
from orchestrator.data.loading import threads
from orchestrator.data.loading.image_source import ImageSource
from orchestrator.data.loading.stream import Batch
from orchestrator.data.loading.threads import loader_threads, measured

NOTHING = np.arange(4)


class Store:
    """A source like a machine on which so many batches can be made at the same time, and its clock."""

    def __init__(self, at_once: int) -> None:
        self._at_once, self._lock = at_once, threading.Lock()
        self.calls = self._told = 0
        self._now = 0.0

    def batch(self, indices: np.ndarray, epoch: int | None = None) -> Batch:
        with self._lock:
            self.calls += 1
        return Batch(torch.zeros(4, 1), torch.zeros(4, dtype=torch.int64), indices, {})

    def clock(self) -> float:
        """Seconds: as many batches as there may be at once take 20 ms together, however busy this machine is."""
        self._now += 0.02 * -(-(self.calls - self._told) // self._at_once)
        self._told = self.calls
        return self._now


@pytest.mark.parametrize(("at_once", "most", "expected"), [(1, 16, 1), (2, 16, 2), (4, 16, 4), (64, 4, 4), (64, 3, 3)])
def test_as_many_threads_as_help(monkeypatch: pytest.MonkeyPatch, at_once: int, most: int, expected: int) -> None:
    store = Store(at_once)
    monkeypatch.setattr(time, "perf_counter", store.clock)
    assert measured(store, NOTHING, most) == expected


def test_a_stated_number_is_not_measured() -> None:
    store = Store(1)
    assert loader_threads(7, store, NOTHING) == 7
    assert store.calls == 0


def test_a_process_measures_once(small: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_answers", {})
    store = Store(1)
    found = loader_threads("auto", store, NOTHING)
    calls = store.calls
    assert calls > 0 and loader_threads("auto", store, NOTHING) == found
    assert store.calls == calls
    source = ImageSource(small, image_size=8, channels=3)
    assert 1 <= loader_threads("auto", source, np.arange(small.num_samples)) <= threads.cores()
