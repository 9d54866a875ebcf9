"""Similarity, hidden convolutions, shortcuts and super-classes as words of a job."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hff.shapes import head_features
from orchestrator.data.packing.pack import pack
from orchestrator.errors import EXIT_DONE, EXIT_JOB
from orchestrator.run.inference.trained import trained_run
from tests.conftest import TINY_JOB, Command
from tests.runs import newest, summary_of

LEVERS = TINY_JOB.replace("arch: vgg", "arch: resnet").replace(
    "prototypes_per_class: 2", "similarity: 0.5, aux_convs: 1, coarse: [3, 6]"
)
# Two dark and two bright classes, by turns, the darkest with a bright row.
BRIGHTNESS = {"a": 30, "b": 200, "c": 40, "d": 220}


def shaded(folder: Path) -> Path:
    """Packed images whose classes differ in brightness."""
    generator = np.random.default_rng(0)
    for name, level in BRIGHTNESS.items():
        for i in range(30):
            path = folder / "images" / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise = generator.integers(-20, 20, (8, 8))
            Image.fromarray((level + noise).clip(0, 255).astype(np.uint8)).save(path)
    pack(str(folder / "images"), folder / "shards")
    return folder / "shards"


def test_a_network_with_all_levers_learns_and_is_the_same_elsewhere(
    tiny_job: Callable[..., Path], in_process: Command, tmp_path: Path
) -> None:
    path = tiny_job("levers", LEVERS)
    done = in_process("run", path, "--set", "train.epochs=6")
    assert done.returncode == EXIT_DONE, done.stderr
    run = tmp_path / "runs" / "levers"
    summary = summary_of(run)
    assert summary["val_top1"] > 0.9
    found = trained_run(run)
    assert [layer.head.groups for layer in found.layers()] == [0, 0, 0], "to predict takes the classes alone"
    layer = found.layers()[2]
    assert layer.head.features == head_features((16, 4, 4), 4)
    done = in_process("eval", run)
    assert f"{100 * summary['val_top1']:.2f}" in done.stdout, done.stdout


def test_super_classes_are_joined_by_what_their_images_look_like_and_kept(
    tiny_job: Callable[..., Path], in_process: Command, tmp_path: Path
) -> None:
    data = f"data: {{{{train: {shaded(tmp_path)}, image_size: 8, channels: 1}}}}"
    text = LEVERS.replace("data: digits", data).replace("[3, 6]", "[2]").replace("epochs: 2", "steps: 2")
    assert in_process("run", tiny_job("shaded", text)).returncode == EXIT_DONE
    kept = tmp_path / "runs" / "shaded" / "superclasses.json"
    assert json.loads(kept.read_text()) == [[0, 1, 0, 1]]


def test_a_run_that_goes_on_from_a_checkpoint_has_the_same_bits(
    tiny_job: Callable[..., Path], in_process: Command, tmp_path: Path
) -> None:
    job, run = tiny_job("again", LEVERS), tmp_path / "runs" / "again"
    assert in_process("run", job).returncode == EXIT_DONE
    first = summary_of(run)
    (run / "summary.json").unlink()
    shutil.rmtree(newest(run))
    assert in_process("run", job).returncode == EXIT_DONE
    again = summary_of(run)
    assert again["attempt_steps"] == [[0, 28], [14, 28]]
    assert again["weights_sha256"] == first["weights_sha256"]


def test_more_super_classes_than_the_data_have_classes_are_told_before_anything_starts(
    tiny_job: Callable[..., Path], in_process: Command, tmp_path: Path
) -> None:
    data = f"data: {{{{train: {shaded(tmp_path)}, image_size: 8, channels: 1}}}}"
    done = in_process("run", tiny_job("shaded", LEVERS.replace("data: digits", data)))
    assert done.returncode == EXIT_JOB
    assert done.stderr.strip() == "objective.coarse.1: must be at most 4, the number of classes, got 6"
    assert not list((tmp_path / "runs" / "shaded").glob("checkpoints/step_*"))


@pytest.mark.parametrize("objective", ["{{name: ce, similarity: 1, coarse: [4]}}", "{{name: hff, aux_convs: 2}}"])
def test_an_exported_network_says_what_the_run_says(
    tiny_job: Callable[..., Path], in_process: Command, tmp_path: Path, objective: str
) -> None:
    text = TINY_JOB.replace("{{name: hff, prototypes_per_class: 2}}", objective).replace("arch: vgg", "arch: resnet")
    assert in_process("run", tiny_job("out", text), "--set", "train.epochs=1").returncode == EXIT_DONE
    out = tmp_path / "net.pt2"
    done = in_process("export", tmp_path / "runs" / "out", "--format", "torch-export", "--out", out)
    assert done.returncode == EXIT_DONE, done.stderr
    assert torch.export.load(out) is not None
