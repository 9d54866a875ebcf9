"""How near the windowed shuffle is to a full one: where samples go, who meets whom, which classes a batch has."""

from __future__ import annotations

import numpy as np
import pytest

from orchestrator.data.loading.order import epoch_order

N, CLASSES, BATCH = 50_000, 100, 256
SORTED = np.arange(N) * CLASSES // N


def windowed(epoch: int, lanes: int = 48, window: int = 8192) -> np.ndarray:
    return epoch_order(np.arange(N), seed=0, epoch=epoch, lanes=lanes, window=window)


def full(epoch: int) -> np.ndarray:
    return np.random.default_rng(epoch).permutation(N)


def batches(order: np.ndarray) -> np.ndarray:
    return order[: N - N % BATCH].reshape(-1, BATCH)


def classes_per_batch(order: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean([len(set(labels[batch].tolist())) for batch in batches(order)]))


def meetings(order: np.ndarray, after: np.ndarray) -> float:
    """How often two samples of a batch are in one batch again in the next epoch, in units of pure chance."""
    batch_of = np.empty(N, dtype=np.int64)
    batch_of[after] = np.arange(N) // BATCH
    counts = [np.bincount(batch_of[batch]) for batch in batches(order)]
    again = np.mean([(count * (count - 1)).sum() / (BATCH * (BATCH - 1)) for count in counts])
    return float(again * N / BATCH)


def test_samples_move_as_far_as_in_a_full_shuffle() -> None:
    for order in (windowed(0), full(0)):
        assert np.abs(np.arange(N) - order).mean() / N == pytest.approx(1 / 3, abs=0.03)


def test_neighbours_come_from_as_far_apart_as_in_a_full_shuffle() -> None:
    for order in (windowed(0), full(0)):
        jumps = np.abs(np.diff(order))
        assert jumps.mean() / N == pytest.approx(1 / 3, abs=0.04)
        assert (jumps < 256).mean() < 0.015


def test_a_batch_is_drawn_from_the_whole_set() -> None:
    spread = np.mean([batch.std() for batch in batches(windowed(0))]) / N
    assert spread == pytest.approx(1 / np.sqrt(12), rel=0.03)


def test_who_shares_a_batch_is_chosen_anew_in_each_epoch() -> None:
    assert meetings(full(0), full(1)) == pytest.approx(1, abs=0.1)
    assert meetings(windowed(0), windowed(1)) < 1.3
    assert meetings(windowed(0, lanes=1, window=1), windowed(1, lanes=1, window=1)) > 50, "a shuffle of blocks alone"


def test_packed_data_have_the_class_mix_of_a_full_shuffle() -> None:
    shuffled_by_pack = np.random.default_rng(7).permutation(SORTED)
    found = classes_per_batch(windowed(0), shuffled_by_pack)
    assert found == pytest.approx(classes_per_batch(full(0), SORTED), rel=0.01)


def test_shards_sorted_by_class_need_more_lanes_for_that_mix() -> None:
    """Foreign shards that were never shuffled: a batch holds at least a class for each lane, not the full mix."""
    best = classes_per_batch(full(0), SORTED)
    assert 48 < classes_per_batch(windowed(0), SORTED) < 0.75 * best
    assert classes_per_batch(windowed(0, lanes=256), SORTED) > best
