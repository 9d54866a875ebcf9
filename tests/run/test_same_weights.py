"""The same job gives the same bits however it is spread over workers, launchers and interruptions."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.conftest import ROOT, Command, environment


def summary_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


def newest(run: Path) -> Path:
    return sorted((run / "checkpoints").glob("step_*"))[-1]


def layer_files(run: Path) -> dict[str, str]:
    """Name and hash of every layer file of the newest checkpoint."""
    files = sorted(newest(run).glob("layer_*.safetensors"))
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture
def trained(tiny_job: Callable[..., Path], orchestrator: Command, tmp_path: Path) -> Callable[..., Path]:
    """Runs the tiny job under another name and returns its run folder."""

    def run(name: str, *settings: str, prefix: tuple[str, ...] = ()) -> Path:
        flags = [word for setting in settings for word in ("--set", setting)]
        result = orchestrator("run", tiny_job(name), *flags, prefix=prefix)
        assert result.returncode == 0, result.stdout + result.stderr
        return tmp_path / "runs" / name

    return run


def test_one_worker_two_stages_and_torchrun_give_the_same_bits_and_another_seed_others(
    trained: Callable[..., Path],
) -> None:
    alone = trained("alone")
    piped = trained("piped", "cluster.workers=2", "cluster.stages=2")
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    launched = trained("launched", "cluster.workers=2", "cluster.stages=2", prefix=torchrun)
    reference = summary_of(alone)
    for other in (piped, launched):
        assert summary_of(other)["weights_sha256"] == reference["weights_sha256"]
        assert summary_of(other)["order_sha256"] == reference["order_sha256"]
        assert summary_of(other)["val_top1"] == reference["val_top1"]
        assert layer_files(other) == layer_files(alone)
    assert summary_of(piped)["stages"] == 2
    assert [layer["stage"] for layer in summary_of(piped)["layers"]] != [0, 0, 0]
    other_seed = summary_of(trained("other", "train.seed=1"))
    assert other_seed["weights_sha256"] != reference["weights_sha256"]
    assert other_seed["order_sha256"] != reference["order_sha256"]


def test_replicas_in_float64_agree_with_one_process_to_the_order_of_sums(trained: Callable[..., Path]) -> None:
    """Batch norm, gradients and a ragged last batch over two data-parallel workers; BP and local alike."""
    for objective in ("{name: hff}", "{name: bp}"):
        name = objective[7:-1]
        settings = ("train.precision=float64", f"objective={objective}")
        alone = trained(f"{name}-alone", *settings)
        together = trained(f"{name}-replicas", *settings, "cluster.workers=2", "cluster.stages=1")
        assert summary_of(together)["replicas"] == [2]
        assert summary_of(together)["order_sha256"] == summary_of(alone)["order_sha256"]
        files = sorted(p.name for p in newest(alone).glob("layer_*.safetensors"))
        for name_of_file in files:
            ours, theirs = (load_file(newest(run) / name_of_file) for run in (alone, together))
            assert ours.keys() == theirs.keys()
            for key, value in ours.items():
                difference = (value.double() - theirs[key].double()).abs().max()
                assert difference <= 1e-9 * value.abs().max(), f"{name_of_file} {key}: {difference}"


def test_a_sequential_run_trains_one_layer_after_the_other_also_as_a_pipeline(trained: Callable[..., Path]) -> None:
    settings = ("train.schedule=sequential", "train.epochs=1")
    alone = trained("one", *settings)
    piped = trained("two", *settings, "cluster.workers=2", "cluster.stages=2")
    assert summary_of(alone)["steps"] == 3 * 14
    assert summary_of(piped)["weights_sha256"] == summary_of(alone)["weights_sha256"]
    assert all(layer["val_top1"] > 0.5 for layer in summary_of(piped)["layers"])


def test_a_run_stopped_by_sigterm_in_mid_epoch_goes_on_to_the_same_weights(
    trained: Callable[..., Path], tiny_job: Callable[..., Path], orchestrator: Command, tmp_path: Path
) -> None:
    epochs = 30
    settings = [f"train.epochs={epochs}", "cluster.workers=2", "cluster.stages=2"]
    whole = summary_of(trained("whole", *settings))
    flags = [word for setting in settings for word in ("--set", setting)]
    job = tiny_job("stopped")
    run = tmp_path / "runs" / "stopped"
    process = subprocess.Popen(
        [sys.executable, "-m", "orchestrator", "run", str(job), *flags],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_step(run, 20)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 75, output + errors
    assert "run the same command again to go on" in errors
    result = orchestrator("run", job, *flags)
    assert result.returncode == 0, result.stdout + result.stderr
    resumed = summary_of(run)
    (first, stopped_at), (went_on, last) = resumed["attempt_steps"]
    assert first == 0
    assert 20 <= stopped_at == went_on < last == whole["steps"]
    assert stopped_at % (whole["steps"] // epochs) != 0, "stopped at an epoch's end: the test proves nothing"
    for key in ("weights_sha256", "order_sha256", "sample_keys_sha256", "val_top1", "samples_seen"):
        assert resumed[key] == whole[key], key
    assert resumed["attempts"] == 2
    assert resumed["run_id"] is not None


def wait_for_step(run: Path, step: int, timeout_s: float = 120) -> None:
    """Wait until a run in another process has come that far."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        try:
            if json.loads((run / "progress.json").read_text())["step"] >= step:
                return
        except FileNotFoundError:
            pass
        time.sleep(0.05)
    raise AssertionError(f"{run.name} did not come to step {step} in {timeout_s} s")
