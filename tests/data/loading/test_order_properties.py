"""Whoever reads, however many, wherever they stop: the global batches are those of one reader that knows only the rule.

The rule is written here a second time, as a walk one sample at a time.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hff.randomness import derive_seed
from orchestrator.data.index import Index, open_index
from orchestrator.data.loading.image_source import ImageSource
from orchestrator.data.loading.order import epoch_order
from orchestrator.data.loading.processes import in_processes
from orchestrator.data.loading.stream import TrainStream
from orchestrator.data.packing.pack import pack
from tests.data.conftest import encoded, write_tar

IMAGES = 700
CASES = 40
BLOCK = 256
Told = tuple[str, int, bytes]


def pixels_of(number: int) -> np.ndarray:
    """A picture of its own for every number."""
    return np.array([[number % 256, number // 256]], dtype=np.uint8).repeat(2, axis=0)


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> list[Index]:
    """The same images in one shard, in a few, and in more than 48."""
    folder = tmp_path_factory.mktemp("layouts")
    files = [(f"{i % 7}/{i:03d}.png", encoded(pixels_of(i))) for i in range(IMAGES)]
    tar = write_tar(folder / "images.tar", files)
    return [pack(tar, folder / str(size), shard_bytes=size) for size in (50_000_000, 333_000, 21_000)]


def walked(n: int, *, seed: int, epoch: int, lanes: int, window: int) -> Iterator[int]:
    """Positions 0 .. n-1 in order of consumption, from the rule in words."""
    random = np.random.Generator(np.random.PCG64(derive_seed(seed, "order", epoch)))
    if n <= window:
        yield from random.permutation(n).tolist()
        return
    borders = [0, *range(int(random.integers(BLOCK)), n, BLOCK), n]
    blocks = [list(range(a, b)) for a, b in pairwise(borders)]
    dealt = iter([i for block in random.permutation(len(blocks)).tolist() for i in blocks[block]])
    stretch = max(1, window // lanes)
    queues: list[list[int]] = []
    for lane in range(lanes):
        mine = [next(dealt) for _ in range(n // lanes + (lane < n % lanes))]
        draws = random.random(len(mine)).tolist()
        queue: list[int] = []
        for start in range(0, len(mine), stretch):
            part = sorted(zip(draws[start : start + stretch], mine[start : start + stretch], strict=True))
            queue += [i for _, i in part]
        queues.append(queue)
    for position in range(n):
        yield queues[position % lanes][position // lanes]


def single_reader(
    subset: np.ndarray, batch_size: int, seed: int, epoch: int, lanes: int, window: int
) -> list[list[int]]:
    """The global batches of an epoch: each is full but the last, and a last single sample joins the one before."""
    batches: list[list[int]] = [[]]
    for position in walked(len(subset), seed=seed, epoch=epoch, lanes=lanes, window=window):
        if len(batches[-1]) == batch_size:
            batches.append([])
        batches[-1].append(int(subset[position]))
    if len(batches) > 1 and len(batches[-1]) == 1:
        single = batches.pop()
        batches[-1] += single
    return batches


class Case:
    """One random set-up: what is decided by the job, and who reads how far in each attempt."""

    def __init__(self, number: int) -> None:
        dice = np.random.default_rng(number)
        self.layout = int(dice.integers(3))
        size = int(dice.integers(1, IMAGES + 1))
        self.subset = np.sort(dice.choice(IMAGES, size, replace=False))
        self.seed = int(dice.integers(2**31))
        self.lanes = int(dice.choice([1, 2, 5, 16, 48, 100]))
        self.window = int(dice.choice([1, 40, 200, 500, 8192]))
        self.batch_size = int(dice.integers(1, min(size, 90) + 1))
        self.first_epoch = int(dice.integers(3))
        per_epoch = len(single_reader(self.subset, self.batch_size, 0, 0, 1, 1))
        self.steps = int(dice.integers(1, min(3 * per_epoch, 40) + 1))
        self.start = self.first_epoch * per_epoch + int(dice.integers(per_epoch))
        self.attempts = []
        step = 0
        while step < self.steps:
            length = int(dice.integers(1, self.steps - step + 1))
            self.attempts.append((int(dice.choice([1, 2, 3, 4, 6])), int(dice.integers(5)), length))
            step += length

    def expected(self) -> list[list[int]]:
        """The global batches of all steps of the case, from the single reader."""
        batches: list[list[int]] = []
        epoch = self.first_epoch
        first = self.start
        while len(batches) < self.steps:
            whole = single_reader(self.subset, self.batch_size, self.seed, epoch, self.lanes, self.window)
            batches += whole[max(0, first - epoch * len(whole)) :]
            epoch += 1
        return batches[: self.steps]


def told(index: Index) -> list[Told]:
    """Key, class and pixels of every sample as Python's own tar reader finds them, shard after shard."""
    found: list[Told] = []
    for shard in range(len(index.shards)):
        with tarfile.open(index.shard_path(shard)) as tar:
            files = [(member.name, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
        for (name, image), (_, label) in zip(files[::2], files[1::2], strict=True):
            pixels = np.asarray(Image.open(io.BytesIO(image)))
            found.append((name.removesuffix(".png"), int(label), pixels.tobytes()))
    return found


def source_of(folder: Path) -> ImageSource:
    return ImageSource(open_index(folder), image_size=2, channels=1)


def read(index: Index, case: Case, processes: int = 0) -> Iterator[list[Told]]:
    """The global batches as the attempts read them; each gives up what its loaders made ahead."""
    source, elsewhere = source_of(index.folder), None
    if processes:
        elsewhere = partial(in_processes, partial(source_of, index.folder), processes=processes, prefetch=3)
    step, end = case.start, case.start + case.steps
    for replicas, threads, length in case.attempts:
        streams = [
            TrainStream(
                source, case.subset, seed=case.seed, lanes=case.lanes, window=case.window,
                global_batch_size=case.batch_size, replica=replica, replicas=replicas, loader_threads=threads,
                prefetch_batches=3, elsewhere=elsewhere,
            )
            for replica in range(replicas)
        ]  # fmt: skip
        readers = [stream.steps(step, end) for stream in streams]
        for _ in range(length):
            together: list[Told] = []
            for batch in map(next, readers):
                images = [image.tobytes() for image in batch.images.numpy()]
                together += zip(index.keys(batch.indices), batch.labels.tolist(), images, strict=True)
            yield together
        step += length
        for reader in readers:
            reader.close()


@pytest.mark.parametrize("number", range(CASES))
def test_global_batches_are_those_of_a_single_reader(layouts: list[Index], number: int) -> None:
    case = Case(number)
    index = layouts[case.layout]
    samples = told(index)
    assert list(read(index, case)) == [[samples[i] for i in batch] for batch in case.expected()]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_global_batches_of_loader_processes_are_those_too(layouts: list[Index], processes: int) -> None:
    """By two replicas first, then by one."""
    case = Case(processes)
    half = max(1, case.steps // 2)
    case.steps = 2 * half
    case.attempts = [(2, 0, half), (1, 0, half)]
    index = layouts[case.layout]
    samples = told(index)
    assert list(read(index, case, processes)) == [[samples[i] for i in batch] for batch in case.expected()]


def test_the_cases_cover_what_can_change() -> None:
    cases = [Case(number) for number in range(CASES)]
    changes = {(a[0], b[0]) for case in cases for a, b in pairwise(case.attempts)}
    assert {replicas for pair in changes for replicas in pair} == {1, 2, 3, 4, 6}
    assert {threads for case in cases for _, threads, _ in case.attempts} == {0, 1, 2, 3, 4}
    assert len({a < b for a, b in changes if a != b}) == 2, "more workers and fewer"
    assert {case.layout for case in cases} == {0, 1, 2}
    windowed = [case for case in cases if case.window < len(case.subset)]
    assert len(windowed) > 15 and any(case.lanes > case.window for case in windowed)


def test_layouts_have_fewer_and_more_shards_than_lanes_and_the_same_order(layouts: list[Index]) -> None:
    assert len(layouts[0].shards) == 1
    assert len(layouts[-1].shards) > 48
    first, *others = [[(key, label) for key, label, _ in told(index)] for index in layouts]
    assert all(other == first for other in others)


@pytest.mark.parametrize("number", range(CASES))
def test_an_epoch_loses_nothing_repeats_nothing_and_differs_from_the_next(number: int) -> None:
    case = Case(number)
    rule = {"seed": case.seed, "lanes": case.lanes, "window": case.window}
    epochs = [epoch_order(case.subset, epoch=epoch, **rule).tolist() for epoch in range(4)]
    assert all(sorted(order) == case.subset.tolist() for order in epochs)
    shuffles = case.window >= min(2 * case.lanes, len(case.subset))
    if len(case.subset) > 10 and shuffles:
        assert len({tuple(order) for order in epochs}) == 4
