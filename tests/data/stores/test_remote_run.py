"""A run of two workers on a bucket behind a bad network is the run on the folder, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.data.index import open_index
from orchestrator.data.packing.pack import pack
from orchestrator.run.records.tracking import epoch_metrics
from tests.conftest import TINY_JOB, Command
from tests.runs import assert_same_bits, summary_of
from tests.stores import BUCKET, Bucket, Fault, door

JOB = TINY_JOB.replace("data: digits", "data: {{train: {train}, val: {{from_train: 0.25}}, image_size: 8, channels: 1, lanes: 8, shuffle_window: 256, cache: {{folder: {cache}, max_bytes: {bound}}}}}")  # fmt: skip  # noqa: E501


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """The embedded digits in some thirty shards."""
    pack("digits", tmp_path / "digits", shard_bytes=100_000)
    return tmp_path / "digits"


def events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_two_workers_on_a_bucket_with_faults_equal_two_on_the_folder(
    digits: Path,
    bucket: Bucket,
    tiny_job: Callable[..., Path],
    in_process: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bucket.upload(digits, tmp_path.name)
    cache, shards = tmp_path / "cache", open_index(digits).shards
    bound = sum(shard.bytes for shard in shards) // 2
    faults = [
        Fault(503, times=5),
        Fault(503, where="index.json"),
        Fault("reset", times=2),
        Fault("cut", where="shard-000003", after=70_000, times=2),
        Fault("flip", where="shard-000005", after=3_000),
        Fault("stall", where="shard-000007", after=10_000, seconds=60),
    ]
    with door(bucket.port, *faults) as before:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{before.port}")
        for name, place in (("near", str(digits)), ("far", f"s3://{BUCKET}/{tmp_path.name}")):
            text = JOB.replace("{train}", place).replace("{cache}", str(cache)).replace("{bound}", str(bound))
            job = tiny_job(name, text)
            done = in_process("run", job, "--set", "cluster.workers=2", "--set", "cluster.stages=1")
            assert done.returncode == 0, done.stdout + done.stderr
            assert "AKIA" not in done.stdout + done.stderr
    near, far = tmp_path / "runs" / "near", tmp_path / "runs" / "far"
    assert_same_bits(far, near)
    assert summary_of(far)["index_sha256"] == summary_of(near)["index_sha256"]
    assert before.fired == {503: 6, "reset": 2, "cut": 2, "flip": 1, "stall": 1}
    counts = [event["remote"] for event in events(far) if event["event"] == "epoch"][-1]
    assert counts["retries"] >= 9
    assert counts["damaged"] == 1
    assert counts["hits"] > 0
    assert counts["bytes"] >= sum(shard.bytes for shard in shards)
    assert sum(file.stat().st_size for file in cache.iterdir() if file.is_file()) <= bound
    assert "AKIATEST" not in (far / "events.jsonl").read_text() + (far / "job.yaml").read_text()
    assert not any(event.get("remote") for event in events(near))


def test_a_missing_shard_ends_a_run_with_exit_3_and_its_url(
    digits: Path,
    bucket: Bucket,
    tiny_job: Callable[..., Path],
    in_process: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bucket.upload(digits, tmp_path.name)
    bucket.delete(f"{tmp_path.name}/shard-000002.tar")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{bucket.port}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    place = f"s3://{BUCKET}/{tmp_path.name}"
    text = JOB.replace("{train}", place).replace("{cache}", str(tmp_path / "cache")).replace("{bound}", str(10**9))
    done = in_process("run", tiny_job("gone", text))
    assert done.returncode == 3, done.stdout + done.stderr
    assert f"{place}/shard-000002.tar: there is no such file (404)" in done.stderr


def test_check_asks_nothing_of_the_network(
    tiny_job: Callable[..., Path], in_process: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = JOB.replace("{train}", "s3://nowhere/x").replace("{cache}", str(tmp_path / "cache"))
    done = in_process("check", tiny_job("offline", text.replace("{bound}", "1000000")))
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "cache").exists()


def test_counts_of_the_network_are_metrics() -> None:
    counts = {"hits": 1, "misses": 2, "bytes": 3, "retries": 4, "damaged": 5, "wait_s": 6}
    event = {
        "event": "epoch",
        "train_loss": [1.0],
        "images_per_second": 1.0,
        "learning_rate": 1.0,
        "remote": counts,
        "busy_fraction": [],
        "val_top1": None,
        "val_top5": None,
        "layer_val_top1": None,
    }
    metrics = epoch_metrics(event)
    assert metrics["data/cache_hits"] == 1
    assert metrics["data/remote_retries"] == 4
    assert metrics["data/remote_wait_seconds"] == 6
