"""Batches made by other processes are those of threads, and no process outlives who asked for them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from orchestrator.data.index import open_index
from orchestrator.data.loading.image_source import ImageSource
from orchestrator.data.loading.processes import in_processes
from orchestrator.data.loading.stream import Batch, TrainStream
from orchestrator.data.packing.pack import pack
from orchestrator.errors import DataError
from tests.conftest import ROOT, environment


def source(folder: Path) -> ImageSource:
    return ImageSource(open_index(folder), image_size=8, channels=1, augment={"crop_padding": 1, "flip": True})


def stream(folder: Path, processes: int) -> TrainStream:
    return TrainStream(
        source(folder),
        np.arange(1797),
        seed=0,
        lanes=4,
        window=300,
        global_batch_size=128,
        elsewhere=partial(in_processes, partial(source, folder), processes=processes, prefetch=4)
        if processes
        else None,
    )


def same(ours: Iterator[Batch], theirs: Iterator[Batch]) -> int:
    """The number of batches, all of them alike."""
    count = 0
    for a, b in zip(ours, theirs, strict=True):
        assert np.array_equal(a.indices, b.indices)
        assert np.array_equal(a.images.numpy(), b.images.numpy())
        assert a.images.stride() == b.images.stride()
        assert np.array_equal(a.labels.numpy(), b.labels.numpy())
        count += 1
    return count


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    pack("digits", tmp_path / "digits")
    return tmp_path / "digits"


def test_batches_of_processes_are_those_of_threads_until_one_is_damaged(digits: Path) -> None:
    assert same(stream(digits, 2).steps(20, 33), stream(digits, 0).steps(20, 33)) == 13
    assert not multiprocessing.active_children()
    shard = next(iter(digits.glob("*.tar")))
    content = bytearray(shard.read_bytes())
    for at in range(600, len(content), 1024):
        content[at] ^= 0xFF
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"shard-000000.tar: key \d+: ") as caught:
        list(stream(digits, 1).epoch(0))
    assert "Traceback" not in str(caught.value)


PROGRAM = """\
import multiprocessing, sys, time
from pathlib import Path
from tests.data.loading.test_processes import stream
if __name__ == "__main__":
    batches = stream(Path(sys.argv[1]), 2).epoch(0)
    next(batches)
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
def test_no_process_outlives_a_killed_trainer(digits: Path, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command, env = [sys.executable, str(program), str(digits)], environment() | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as trainer:
        assert trainer.stdout is not None
        children = [int(word) for word in trainer.stdout.readline().split()]
        os.kill(trainer.pid, signal.SIGKILL)
    assert len(children) == 2
    until = time.monotonic() + 30
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < until, "a loader process is left"
        time.sleep(0.2)
