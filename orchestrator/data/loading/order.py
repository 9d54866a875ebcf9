"""In which order the samples of an epoch are consumed, and how batches divide it. Pure functions."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hff.randomness import derive_seed

Indices = NDArray[np.int64]
_BLOCK = 256


def epoch_order(subset: Indices, *, seed: int, epoch: int, lanes: int, window: int) -> Indices:
    """The samples of one epoch in order of consumption: a permutation of `subset`.

    Depends on nothing but the arguments, so not on workers or loaders. Blocks of neighbouring samples are
    permuted and dealt into lanes; inside a lane, stretches of `window` / lanes samples are shuffled; position p
    of the epoch belongs to lane p mod lanes. A set no larger than the window is shuffled as a whole.
    """
    n = len(subset)
    random = np.random.Generator(np.random.PCG64(derive_seed(seed, "order", epoch)))
    if n <= window:
        shuffled: Indices = subset[random.permutation(n)]
        return shuffled
    positions = _permuted_blocks(n, random)
    stretch = max(1, window // lanes)
    sizes = [n // lanes + (lane < n % lanes) for lane in range(lanes)]
    full = np.empty((lanes, n // lanes), dtype=np.int64)
    rest = []
    start = 0
    for lane, size in enumerate(sizes):
        walked = _shuffled_stretches(positions[start : start + size], stretch, random)
        full[lane] = walked[: n // lanes]
        rest += walked[n // lanes :].tolist()
        start += size
    dealt = np.concatenate([full.T.ravel(), np.array(rest, dtype=np.int64)])
    result: Indices = subset[dealt]
    return result


def training_order(
    subset: Indices, *, seed: int, epoch: int, lanes: int, window: int, repeated: int | None = None
) -> Indices:
    """The samples that an epoch trains on: its order or, where a batch is `repeated`, that many of the first again."""
    if repeated is None:
        return epoch_order(subset, seed=seed, epoch=epoch, lanes=lanes, window=window)
    first = epoch_order(subset, seed=seed, epoch=0, lanes=lanes, window=window)[:repeated]
    return np.resize(first, len(subset))


def _permuted_blocks(n: int, random: np.random.Generator) -> Indices:
    """0 .. n-1 in blocks, the blocks in random order; where the first block begins is random too."""
    offset = int(random.integers(_BLOCK))
    borders = np.arange(offset, n, _BLOCK)
    blocks = np.split(np.arange(n, dtype=np.int64), borders)
    return np.concatenate([blocks[i] for i in random.permutation(len(blocks))])


def _shuffled_stretches(lane: Indices, stretch: int, random: np.random.Generator) -> Indices:
    """Each run of `stretch` samples shuffled in itself."""
    keys = random.random(len(lane)) + np.arange(len(lane)) // stretch
    return lane[np.argsort(keys, kind="stable")]


def batch_bounds(num_samples: int, global_batch_size: int) -> list[tuple[int, int]]:
    """(start, stop) of every global batch of an epoch.

    A last batch of one sample joins the one before: a batch norm, which sees all replicas, needs two.
    """
    starts = list(range(0, num_samples, global_batch_size))
    bounds = [(start, min(start + global_batch_size, num_samples)) for start in starts]
    if len(bounds) > 1 and bounds[-1][1] - bounds[-1][0] < 2:
        _, stop = bounds.pop()
        bounds[-1] = (bounds[-1][0], stop)
    return bounds


def replica_slice(start: int, stop: int, replica: int, replicas: int) -> tuple[int, int]:
    """The part of a global batch that one replica takes: contiguous, sizes differ by one at most."""
    samples = stop - start
    return start + samples * replica // replicas, start + samples * (replica + 1) // replicas


def steps_per_epoch(num_samples: int, global_batch_size: int) -> tuple[int, int]:
    """Steps of an epoch and the most samples in one step."""
    bounds = batch_bounds(num_samples, global_batch_size)
    return len(bounds), max(stop - start for start, stop in bounds)
