"""How features are made: stopped, shared, damaged, refused, by one process or several."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from orchestrator.data.cached.feature_store import is_whole
from orchestrator.data.cached.features import FeatureSet
from orchestrator.data.index import open_index
from orchestrator.data.packing.pack import pack
from orchestrator.errors import DataError, Interrupted, JobError
from orchestrator.job.resolved import job_to_dict
from orchestrator.job.schema import Job
from orchestrator.launch.features import Maker, features_command
from orchestrator.launch.workers import crews, local
from orchestrator.launch.workers.crews import Here, Recruit, here
from orchestrator.run import checkpoint
from orchestrator.run.features import Wanted, examine, wanted_sets
from orchestrator.run.folder import RunFolder
from tests.data.conftest import PNG_END
from tests.run.feature_jobs import Leaving, Make, opened, prepared, train

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def ready(job: Job) -> tuple[Recruit, Wanted]:
    values, datasets = job_to_dict(job), opened(job)
    trunk = examine(values, 10, None)
    return Recruit(values, 10, trunk, None), wanted_sets(values, datasets, trunk)[0][0]


class Signalled(Here):
    """A crew whose driver gets SIGTERM while the second shard is being computed."""

    def submit(self, wanted: Wanted, number: int, tick: Callable[[], None]) -> Any:
        def tick_and_signal() -> None:
            tick()
            os.kill(os.getpid(), signal.SIGTERM)

        return super().submit(wanted, number, tick_and_signal if number == 1 else tick)


def test_a_stopped_extraction_keeps_its_finished_shards_and_goes_on(job: Make, tmp_path: Path) -> None:
    recruit, wanted = ready(job("sample", runs=tmp_path))
    said: list[str] = []
    with pytest.raises(Interrupted) as caught:
        Maker(lambda: nullcontext(Signalled(recruit)), said.append, lambda _: None).make([wanted])
    assert caught.value.exit_code == 75
    assert said == ["SIGTERM: leaving after the batch that is being computed (again: leave at once)"]
    assert not Path(wanted.plan.folder).exists()
    assert (wanted.plan.partial / "features-000000.tar").exists()
    assert not (wanted.plan.partial / "features-000001.tar").exists()
    told: list[dict[str, Any]] = []
    Maker(lambda: here(recruit), said.append, told.append).make([wanted])
    size = wanted.plan.ranges[0][1]
    assert f"Features of train: {size} of 1797 images are there already" in said
    assert [e["made"] for e in told] == [1797 - size]
    reference = FeatureSet(prepared(job())[0].plan.folder)
    rows = np.arange(1797)
    assert np.array_equal(FeatureSet(wanted.plan.folder).gather(rows), reference.gather(rows))


def test_a_stop_after_the_last_shard_does_not_let_the_training_begin(job: Make, tmp_path: Path) -> None:
    recruit, wanted = ready(job("late", runs=tmp_path))

    def signalled(event: dict[str, Any]) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="finished shards are kept"):
        Maker(lambda: here(recruit), lambda _: None, signalled).make([wanted])
    assert is_whole(wanted.plan)


def test_two_writers_at_once_make_one_set(job: Make, tmp_path: Path) -> None:
    recruit, wanted = ready(job("sample", runs=tmp_path))
    told: list[dict[str, Any]] = []
    both = [Here(recruit), Here(recruit)]
    start = threading.Barrier(2)

    def write(crew: Here) -> None:
        start.wait(10)
        # Signals belong to the main thread: below what sets them up.
        Maker(lambda: nullcontext(crew), lambda _: None, told.append)._make(wanted, crew)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, both))
    assert sorted(e["made"] for e in told) == [0, 1797]
    assert is_whole(wanted.plan)
    assert [p.name for p in (tmp_path / ".features").iterdir()] == [Path(wanted.plan.folder).name]


def test_a_cut_shard_is_made_again_and_not_used(job: Make, tmp_path: Path) -> None:
    small = job("sample", runs=tmp_path)
    wanted = prepared(small)[0]
    whole = FeatureSet(wanted.plan.folder).gather(np.arange(1797))
    shard = Path(wanted.plan.folder) / "features-000001.tar"
    shard.write_bytes(shard.read_bytes()[:10_000])
    told: list[dict[str, Any]] = []
    prepared(small, told.append)
    assert [e["made"] for e in told] == [1797]
    assert np.array_equal(FeatureSet(wanted.plan.folder).gather(np.arange(1797)), whole)


def test_a_worker_that_fails_stops_the_others_and_its_error_is_the_one_that_is_seen(
    job: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers, here in threads; the fourth shard has a damaged image."""
    recruit, wanted = ready(job("sample", runs=tmp_path))
    index = open_index(wanted.source)
    shard = index.folder / index.shards[0].name
    content = bytearray(shard.read_bytes())
    content[int(index.members["offset"][1000]) + 20] ^= 1
    shard.write_bytes(content)
    monkeypatch.setattr(crews, "_own", [recruit.extractor(torch.device("cpu"))])
    with ThreadPoolExecutor(2) as pool, pytest.raises(DataError) as caught:
        Maker(lambda: nullcontext(crews.Processes(pool, 2)), lambda _: None, lambda _: None).make([wanted])
    assert "key 000001000: member .png: expected CRC32" in str(caught.value)
    kept = sorted(p.name for p in wanted.plan.partial.glob("*.tar"))
    assert 0 < len(kept) < len(wanted.plan.ranges)
    assert not list((tmp_path / ".features").glob(".*.lock"))


@pytest.mark.parametrize("cache", ["true", "false"])
def test_an_image_that_cannot_be_decoded_is_a_counted_skip_over_an_interruption_too(
    job: Make, tmp_path: Path, cache: str
) -> None:
    for i in range(40):
        path = tmp_path / "images" / "ab"[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:60] + PNG_END)
    index = pack(tmp_path / "images", tmp_path / "packed")
    settings = (f"data.train={index.folder}", "data.val=null", "train.global_batch_size=4", "train.epochs=1")

    def sample(name: str) -> Job:
        return job(name, *settings, f"features.cache={cache}", runs=tmp_path / "runs")

    whole = train(sample("whole"))
    assert whole["skipped_samples"] == 1
    assert whole["samples_seen"] == 39
    with pytest.raises(Interrupted):
        train(sample("cut"), launch=lambda assignment: local.run_here(assignment, Leaving(8)))
    newest, _ = checkpoint.newest_valid(RunFolder(tmp_path / "runs" / "cut"))
    assert newest is not None
    left_out = checkpoint.read_state(newest)["ledger"]["epoch_skipped"]
    assert len(left_out) == 1, "stopped before the bad image: the test proves nothing"
    resumed = train(sample("cut"))
    assert resumed["attempts"] == 2
    for key in ("order_sha256", "sample_keys_sha256", "skipped_samples", "samples_seen", "weights_sha256"):
        assert resumed[key] == whole[key], key


def test_numbers_too_large_for_float16_are_refused_with_the_remedy(job: Make, tmp_path: Path) -> None:
    settings = ("features.dtype=float16", "data.std=[1e-6, 1e-6, 1e-6]")
    with pytest.raises(JobError) as caught:
        prepared(job("sample", *settings, runs=tmp_path))
    assert caught.value.exit_code == 2
    assert str(caught.value).startswith("features.dtype: must be float32 for this backbone, got 'float16': its output")


def test_the_command_makes_what_a_job_needs_and_refuses_other_jobs(
    job: Make, home: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    job("command")
    path = str(home / "command.yaml")
    assert features_command(path, [f"runs={tmp_path}"]) == 0
    out = capsys.readouterr().out
    assert "Features of train: 1797 images, " in out and "images/s); kept in " in out
    assert features_command(path, [f"runs={tmp_path}"]) == 0
    assert f"Features of train: 1797 images, in {tmp_path / '.features'}" in capsys.readouterr().out
    for override in ("model.freeze=none", "features.cache=false"):
        with pytest.raises(JobError, match=r"has no features to make: only a transfer job with model\.freeze all"):
            features_command(path, [override])
    shutil.rmtree(tmp_path)


@pytest.mark.slow
def test_two_processes_compute_the_features_of_one(job: Make, tmp_path: Path) -> None:
    ours = prepared(job("sample", "cluster.workers=2", runs=tmp_path))[0].plan.folder
    theirs = prepared(job())[0].plan.folder
    assert Path(ours).name == Path(theirs).name
    assert FeatureSet(ours).index.sha256 == FeatureSet(theirs).index.sha256
