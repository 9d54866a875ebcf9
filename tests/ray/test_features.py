"""Features computed by Ray actors, and heads trained on them by Ray Train workers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestrator.data.index import FEATURES, open_index
from tests.conftest import Command

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

JOB = """\
kind: transfer
name: sample
runs: {runs}
data: {{train: digits, val: {{from_train: 0.25}}, image_size: 32}}
model: {{backbone: test_resnet.r160_in1k, pretrained: false, vote: equal}}
objective: {{name: hff}}
train: {{epochs: 1, global_batch_size: 100, lr: 5.0e-3}}
features: {{dtype: float32}}
cluster: {{launcher: ray, workers: 2, stages: 2, timeout_s: 300}}
tracking: {{uri: "sqlite:///{database}"}}
"""


def test_ray_actors_compute_the_bytes_of_one_process_and_training_on_them_gives_its_weights(
    orchestrator: Command, tmp_path: Path, shared_database: Path
) -> None:
    def run(launcher: str, *settings: str) -> Path:
        runs, path = tmp_path / launcher, tmp_path / f"{launcher}.yaml"
        path.write_text(JOB.format(runs=runs, database=shared_database))
        flags = [word for setting in settings for word in ("--set", setting)]
        done = orchestrator("run", path, *flags, timeout=500)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Features of train: 1797 images, 1184 numbers each, in " in done.stdout
        return runs

    on_ray = run("ray")
    alone = run("process", "cluster.launcher=process", "cluster.workers=1", "cluster.stages=1")
    (ours,), (theirs,) = ((runs / ".features").iterdir() for runs in (on_ray, alone))
    assert ours.name == theirs.name
    assert open_index(ours, FEATURES).sha256 == open_index(theirs, FEATURES).sha256
    a, b = (json.loads((runs / "sample" / "summary.json").read_text()) for runs in (on_ray, alone))
    assert (a["world_size"], b["world_size"]) == (2, 1)
    for key in ("weights_sha256", "order_sha256", "val_top1"):
        assert a[key] == b[key], key
