"""A node that dies and comes back: the run goes on with what is left, and grows again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Command, environment, started
from tests.runs import assert_same_bits, summary_of, wait_for_step
from tests.stores import wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]
EVERY = 20
JOB = f"""\
kind: train
name: elastic
runs: RUNS
data: digits
model: {{arch: vgg, widths: [96, 128, 128], head_grid: 4}}
objective: {{name: hff}}
train: {{epochs: 120, global_batch_size: 100, optimizer: adamw, lr: 1e-3, eval_every_epochs: 40}}
cluster: {{workers: {{min: 1, max: 2}}, threads_per_worker: 1, timeout_s: 30}}
checkpoint: {{every_steps: {EVERY}}}
"""


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A Ray cluster whose head has one CPU."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_worker_niceness", "0")
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        yield made
    finally:
        made.shutdown()


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    return [event for event in lines if event["event"] == kind]


def test_a_run_survives_the_loss_of_a_node_and_grows_back_with_the_same_bits(
    cluster: Any, in_process: Command, tmp_path: Path
) -> None:
    job, run = tmp_path / "elastic.yaml", tmp_path / "runs" / "elastic"
    job.write_text(JOB.replace("RUNS", str(tmp_path / "runs")))
    node = cluster.add_node(num_cpus=1)
    env = environment() | {"RAY_ADDRESS": cluster.address, "RAY_USAGE_STATS_ENABLED": "0"}
    with started("run", job, env=env) as process:
        wait_for_step(run, 50)
        at_loss = json.loads((run / "progress.json").read_text())["step"]
        cluster.remove_node(node, allow_graceful=False)
        wait_until(lambda: len(events(run, "start")) == 2, timeout_s=180)
        cluster.add_node(num_cpus=1)
        wait_until(lambda: len(events(run, "start")) == 3, timeout_s=180)
        output, errors = process.communicate(timeout=400)
    assert process.returncode == 0, output + errors
    assert "There is room for more workers" in output
    assert [event["workers"] for event in events(run, "plan")] == [2, 1, 2]
    assert all(stage["replicas"] == 1 for event in events(run, "plan") for stage in event["stages"])
    second, third = (event["step"] for event in events(run, "start")[1:])
    assert second >= at_loss - EVERY, "nothing beyond the last checkpoint is lost"
    assert third > second
    summary = summary_of(run)
    assert (summary["attempts"], summary["world_size"]) == (3, 2)
    alone = ("name=alone", "cluster.workers=1", "cluster.launcher=process")
    result = in_process("run", job, *(word for setting in alone for word in ("--set", setting)))
    assert result.returncode == 0, result.stderr
    assert_same_bits(run, tmp_path / "runs" / "alone")
