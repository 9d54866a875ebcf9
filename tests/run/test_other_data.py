"""Data are known by the hash of their index: a run goes on with the same data elsewhere, and with no others."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.data.packing.pack import pack
from orchestrator.errors import EXIT_CHECKPOINT, EXIT_DONE, EXIT_JOB
from tests.conftest import TINY_JOB, Command
from tests.data.conftest import encoded, noise, write_tar

JOB = TINY_JOB.replace("data: digits", "data: {{train: {train}, val: {val}, image_size: 8}}").replace(
    "global_batch_size: 100", "global_batch_size: 10"
)


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Path]:
    """Two training sets and two validation sets of the same sizes and classes, and a copy of the first of each."""
    found = {}
    for seed, name in enumerate(("train", "other-train", "val", "other-val")):
        images = [(f"{'ab'[i % 2]}/{i:02d}.png", encoded(noise(100 * seed + i, 8, 8))) for i in range(20)]
        found[name] = Path(pack(write_tar(tmp_path / f"{name}.tar", images), tmp_path / name).folder)
    for name in ("train", "val"):
        found[f"copied-{name}"] = Path(shutil.copytree(found[name], tmp_path / f"copied-{name}"))
    return found


@pytest.fixture
def trained(
    places: dict[str, Path], tiny_job: Callable[..., Path], in_process: Command, tmp_path: Path
) -> tuple[Path, Path]:
    """A job on the first sets, and its finished run."""
    job = tiny_job("run", JOB.replace("{train}", str(places["train"])).replace("{val}", str(places["val"])))
    done = in_process("run", job)
    assert done.returncode == EXIT_DONE, done.stderr
    return job, tmp_path / "runs" / "run"


@pytest.mark.parametrize("part", ["train", "val"])
def test_an_unfinished_run_goes_on_with_the_same_data_elsewhere_and_not_with_others(
    part: str, trained: tuple[Path, Path], places: dict[str, Path], in_process: Command
) -> None:
    job, run = trained
    (run / "summary.json").unlink()
    other = in_process("run", job, "--set", f"data.{part}={places[f'other-{part}']}")
    assert other.returncode == EXIT_JOB
    assert f"data.{part}: must be the data that this run was started with (index " in other.stderr
    assert not (run / "summary.json").exists()
    copied = in_process("run", job, "--set", f"data.{part}={places[f'copied-{part}']}")
    assert copied.returncode == EXIT_DONE, copied.stderr


def test_a_finished_run_is_not_said_to_be_that_of_other_data(
    trained: tuple[Path, Path], places: dict[str, Path], in_process: Command
) -> None:
    job, _ = trained
    assert in_process("run", job, "--set", f"data.train={places['other-train']}").returncode == EXIT_JOB
    assert in_process("run", job, "--set", f"data.train={places['copied-train']}").returncode == EXIT_DONE
    shutil.rmtree(places["train"])
    assert in_process("run", job).returncode == EXIT_DONE


def test_a_finished_run_without_a_whole_checkpoint_is_no_success(
    trained: tuple[Path, Path], in_process: Command
) -> None:
    job, run = trained
    for layer in run.glob("checkpoints/*/layer_01.safetensors"):
        layer.unlink()
    done = in_process("run", job)
    assert done.returncode == EXIT_CHECKPOINT
    assert "no checkpoint is whole" in done.stderr
    shutil.rmtree(run / "checkpoints")
    done = in_process("run", job)
    assert (done.returncode, "the run is finished, but it has no checkpoint" in done.stderr) == (EXIT_CHECKPOINT, True)
