"""A small valid job and a way to write and load it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.job.load import load_job
from orchestrator.job.schema import Job

TEXT = """\
kind: train
name: sample
data: {train: data/shards, image_size: 32}
model: {arch: vgg, widths: [8, 16, 32, 64], pool_after: [1]}
objective: {name: hff}
train: {epochs: 4, global_batch_size: 100, lr: 1e-3}
"""

Load = Callable[..., Job]


@pytest.fixture
def text() -> str:
    return TEXT


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Load a job with overrides from a folder that is no repository."""

    def call(*overrides: str, content: str = TEXT) -> Job:
        path = tmp_path / "x.yaml"
        path.write_text(content, encoding="utf-8")
        return load_job(path, overrides)

    return call
