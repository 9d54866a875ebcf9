"""Real images, from their archive through pack, verify and stream: each of them once, with its class."""

from __future__ import annotations

import tarfile
from collections import Counter
from pathlib import Path, PurePosixPath

import numpy as np
import pytest

from orchestrator.data.loading.image_source import ImageSource
from orchestrator.data.loading.stream import TrainStream
from orchestrator.data.packing.pack import pack
from orchestrator.data.reader import ShardReader
from orchestrator.data.verify import problems
from tests.conftest import TEST_DATA


@pytest.mark.parametrize(
    ("name", "size", "channels"),
    [
        ("tiny-imagenet20-val.tar", 64, 3),
        pytest.param("tiny-imagenet20-train.tar", 64, 3, marks=pytest.mark.slow),
        pytest.param("mnist-test.tar.gz", 28, 1, marks=pytest.mark.slow),
    ],
)
def test_every_image_of_an_archive_comes_out_once(name: str, size: int, channels: int, tmp_path: Path) -> None:
    path = TEST_DATA / name
    if not path.exists():
        pytest.skip(f"{name} is not there")
    with tarfile.open(path) as tar:
        files = [(PurePosixPath(m.name).parts[-2], tar.extractfile(m).read()) for m in tar if m.isfile()]  # type: ignore[union-attr]
    index = pack(path, tmp_path / "set", shard_bytes=500_000)
    assert problems(index, decode=True) == []
    reader = ShardReader(index)
    stream = TrainStream(
        ImageSource(index, image_size=size, channels=channels),
        np.arange(index.num_samples),
        seed=1,
        lanes=6,
        window=256,
        global_batch_size=100,
        bad_sample_budget=0,
    )
    seen: Counter[tuple[str, bytes]] = Counter()
    for batch in stream.epoch(0):
        assert batch.images.shape == (len(batch.indices), channels, size, size)
        for i, label in zip(batch.indices.tolist(), batch.labels.tolist(), strict=True):
            seen[index.classes[label], reader.read(i)[2]] += 1
    assert seen == Counter(files)
