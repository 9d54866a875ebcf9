"""What a GPU computes is what a CPU computes, but for rounding; links between GPUs and a run that diverges on one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Command
from tests.runs import newest, summary_of

pytestmark = pytest.mark.gpu

ON_GPU = ("cluster.use_gpu=true", "cluster.timeout_s=120")
# Adam's first updates are signs of gradients, which rounding can turn over.
FEW_STEPS = (
    "train.epochs=null", "train.steps=6", "train.optimizer=sgd", "train.lr=0.05", "train.lr_schedule=constant",
    "checkpoint={every_steps: 1, keep_last: 10}",
)  # fmt: skip
PIPED = ("cluster.workers=2", "cluster.stages=2")


@pytest.fixture(autouse=True)
def gpus() -> int:
    """How many GPUs there are; without one the test is skipped."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("torch finds no GPU here")
    return torch.cuda.device_count()


@pytest.fixture
def trained(tiny_job: Callable[..., Path], in_process: Command, tmp_path: Path) -> Callable[..., Path]:
    """The folder of a tiny run with these settings that has finished."""

    def train(name: str, *settings: str) -> Path:
        result = in_process("run", tiny_job(name), *(word for setting in settings for word in ("--set", setting)))
        assert result.returncode == 0, result.stderr
        return tmp_path / "runs" / name

    return train


def weights(checkpoint: Path) -> Any:
    """All that the layers of a checkpoint have learned, as one vector."""
    import torch
    from safetensors.torch import load_file

    files = sorted(checkpoint.glob("layer_??.safetensors"))
    return torch.cat(
        [t.double().flatten() for file in files for _, t in sorted(load_file(file).items()) if t.is_floating_point()]
    )


def assert_same_but_for_rounding(run: Path, other: Path) -> None:
    """Two runs end nearer to one another, by far, than either has come from its first step."""
    began, ended = (weights(run / "checkpoints" / f"step_{step:09}") for step in (1, 6))
    assert (weights(newest(other)) - ended).norm() < 0.05 * (ended - began).norm()
    assert summary_of(run)["order_sha256"] == summary_of(other)["order_sha256"]


def test_a_run_on_a_gpu_comes_to_the_accuracy_of_the_cpu_in_memory_of_the_gpu(trained: Callable[..., Path]) -> None:
    cpu, gpu = summary_of(trained("cpu")), summary_of(trained("gpu", *ON_GPU))
    assert cpu["val_top1"] > 0.5, "nothing can be compared at chance"
    assert gpu["val_top1"] == pytest.approx(cpu["val_top1"], abs=0.05)
    assert gpu["order_sha256"] == cpu["order_sha256"]
    assert 0 < gpu["peak_memory_bytes"][0] < cpu["peak_memory_bytes"][0], "allocated there, not resident here"


def test_two_stages_on_one_gpu_are_one_process_but_for_rounding(
    trained: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = trained("alone", *FEW_STEPS, *ON_GPU)
    first, _, _ = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", first)  # the workers are processes that read it anew
    assert_same_but_for_rounding(alone, trained("piped", *FEW_STEPS, *ON_GPU, *PIPED))


@pytest.mark.parametrize("mesh", [PIPED, ("cluster.workers=2", "cluster.stages=1")], ids=["stages", "replicas"])
def test_two_gpus_joined_by_nccl_are_one_process_but_for_rounding(
    trained: Callable[..., Path], gpus: int, mesh: tuple[str, ...]
) -> None:
    if gpus < 2:
        pytest.skip(f"NCCL joins two GPUs, here is {gpus}")
    alone = trained("alone", *FEW_STEPS, *ON_GPU)
    joined = trained("joined", *FEW_STEPS, *ON_GPU, *mesh, "cluster.transport=nccl")
    assert_same_but_for_rounding(alone, joined)


def test_a_run_that_diverges_on_a_gpu_stops_before_anything_of_it_is_saved(
    tiny_job: Callable[..., Path], in_process: Command, tmp_path: Path
) -> None:
    diverging = ("objective={name: ce}", "train.lr_schedule=constant", "train.lr=1e37", "checkpoint.every_steps=5")
    words = [word for setting in (*diverging, *ON_GPU) for word in ("--set", setting)]
    result = in_process("run", tiny_job("diverging"), *words)
    assert result.returncode == 1
    assert ": its loss is not finite " in result.stderr
    for checkpoint in (tmp_path / "runs" / "diverging" / "checkpoints").glob("step_*"):
        assert weights(checkpoint).isfinite().all(), checkpoint.name
    assert not (tmp_path / "runs" / "diverging" / "summary.json").exists()
