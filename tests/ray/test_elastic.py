"""Nodes of a Ray cluster that die, come back or are taken back with notice, and a head that dies."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Command, environment, started
from tests.processes import Descendants
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
def clusters(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Any]]:
    """Makes Ray clusters whose head has one CPU."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_worker_niceness", "0")
    from ray.cluster_utils import Cluster

    made = []

    def make() -> Any:
        made.append(Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}))
        return made[-1]

    try:
        yield make
    finally:
        for cluster in made:
            cluster.shutdown()


@pytest.fixture
def job(tmp_path: Path) -> Path:
    path = tmp_path / "elastic.yaml"
    path.write_text(JOB.replace("RUNS", str(tmp_path / "runs")))
    return path


def environment_of(cluster: Any) -> dict[str, str]:
    return environment() | {"RAY_ADDRESS": cluster.address, "RAY_USAGE_STATS_ENABLED": "0"}


def assert_as_if_alone(run: Path, job: Path, in_process: Command) -> None:
    """The same bits as one process that nothing happened to."""
    alone = ("name=alone", "cluster.workers=1", "cluster.launcher=process")
    result = in_process("run", job, *(word for setting in alone for word in ("--set", setting)))
    assert result.returncode == 0, result.stderr
    assert_same_bits(run, run.with_name("alone"))


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    return [event for event in lines if event["event"] == kind]


def test_a_run_survives_the_loss_of_a_node_and_grows_back_with_the_same_bits(
    clusters: Callable[[], Any], job: Path, in_process: Command, tmp_path: Path
) -> None:
    run, cluster = tmp_path / "runs" / "elastic", clusters()
    node = cluster.add_node(num_cpus=1)
    with started("run", job, env=environment_of(cluster)) as process:
        wait_for_step(run, 50, timeout_s=300)
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
    assert_as_if_alone(run, job, in_process)


def test_a_run_whose_node_is_taken_back_with_notice_saves_and_goes_on_without_it(
    clusters: Callable[[], Any], job: Path, in_process: Command, tmp_path: Path
) -> None:
    """Ray's way to announce it, for autoscalers and `ray drain-node`; no failure of the run is allowed."""
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION

    run, cluster = tmp_path / "runs" / "elastic", clusters()
    node = cluster.add_node(num_cpus=1)
    rare = ("cluster.max_failures=0", "checkpoint.every_steps=100000", "checkpoint.every_epochs=100")
    words = [word for setting in rare for word in ("--set", setting)]
    with started("run", job, *words, env=environment_of(cluster)) as process:
        wait_for_step(run, 50, timeout_s=300)
        deadline_ms = int((time.time() + 60) * 1000)
        accepted, why = GcsClient(address=cluster.address).drain_node(
            node.node_id, DRAIN_NODE_REASON_PREEMPTION, "the spot market wants it back", deadline_ms
        )
        assert accepted, why
        wait_until(lambda: len(events(run, "start")) == 2, timeout_s=180)
        cluster.remove_node(node, allow_graceful=False)
        output, errors = process.communicate(timeout=400)
    assert process.returncode == 0, output + errors
    assert "starting again elsewhere from the newest checkpoint (preemption 1 of 100)" in output
    assert [event["workers"] for event in events(run, "plan")] == [2, 1]
    (first, left), (again, last) = summary_of(run)["attempt_steps"]
    assert 0 == first < 50 <= left == again < last, "no step was done twice, though nothing else had saved"
    assert_as_if_alone(run, job, in_process)


def test_when_the_head_dies_a_new_cluster_goes_on_from_the_files_alone(
    clusters: Callable[[], Any], job: Path, in_process: Command, tmp_path: Path
) -> None:
    run, cluster = tmp_path / "runs" / "elastic", clusters()
    with started("run", job, env=environment_of(cluster)) as process, Descendants(process.pid) as family:
        wait_for_step(run, 50, timeout_s=300)
        cluster.remove_node(cluster.head_node, allow_graceful=False)
        output, errors = process.communicate(timeout=180)
    assert process.returncode != 0, output + errors
    assert family.left(within_s=60) == []
    with started("run", job, env=environment_of(clusters())) as process:
        output, errors = process.communicate(timeout=400)
    assert process.returncode == 0, output + errors
    attempts = summary_of(run)["attempt_steps"]
    assert len(attempts) == 2
    assert attempts[1][0] >= 50 - EVERY, "nothing beyond the last checkpoint is lost"
    assert_as_if_alone(run, job, in_process)
