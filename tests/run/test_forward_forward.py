"""The Forward-Forward objective in runs: its negatives, its accuracy, and that it can be used like any other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from orchestrator.errors import EXIT_DONE, EXIT_JOB
from orchestrator.run.pairs import Pairs
from tests.conftest import TINY_JOB, Command
from tests.runs import assert_same_bits, summary_of

# Their own brightness: black is 0, as a label's zeros are.
DIGITS = "data: {{train: digits, val: {{from_train: 0.25}}, image_size: 8, channels: 1, mean: [0.0]}}"
FF_JOB = (
    TINY_JOB.replace(
        "{{arch: vgg, widths: [8, 8, 16], pool_after: [1], head_grid: 4}}",
        "{{arch: mlp, widths: [200, 200, 200], norm: none, vote: [0, 1, 1]}}",
    )
    .replace("{{name: hff, prototypes_per_class: 2}}", "{{name: ff}}")
    .replace("data: digits", DIGITS)
    .replace("epochs: 2", "epochs: 8")
)


def pairs() -> Pairs:
    return Pairs(num_classes=10, samples=50, seed=3, epoch_of=lambda step: step // 10)


def wrong_labels(made: torch.Tensor) -> list[int]:
    return [int(v) for v in made[:, 1].flatten(1)[:, :10].argmax(dim=1)]


def test_the_wrong_label_of_a_sample_is_the_same_however_batches_are_shared() -> None:
    x = torch.rand(6, 1, 4, 4) + 0.1
    label, indices = torch.arange(6), np.array([7, 49, 0, 3, 21, 8])
    whole = pairs()(x, label, indices, step=12)
    parts = [pairs()(x[i : i + 3], label[i : i + 3], indices[i : i + 3], step=15) for i in (0, 3)]
    assert torch.equal(whole, torch.cat(parts))
    assert all(wrong != right for wrong, right in zip(wrong_labels(whole), range(6), strict=True))
    assert wrong_labels(whole) != wrong_labels(pairs()(x, label, indices, step=20)), "another epoch, other labels"


def test_every_wrong_label_is_as_likely() -> None:
    drawn = Pairs(num_classes=10, samples=9000, seed=0, epoch_of=lambda step: step)
    x, label = torch.full((9000, 1, 4, 4), 0.5), torch.zeros(9000, dtype=torch.int64)
    counts = np.bincount(wrong_labels(drawn(x, label, np.arange(9000), step=0)), minlength=10)
    assert counts[0] == 0
    assert counts[1:].min() > 850


def test_it_learns_digits_and_its_network_is_evaluated_as_it_was_in_the_run(
    tiny_job: Callable[..., Path], in_process: Command, tmp_path: Path
) -> None:
    path = tiny_job("ff", FF_JOB)
    done = in_process("run", path)
    assert done.returncode == EXIT_DONE, done.stdout + done.stderr
    run = tmp_path / "runs" / "ff"
    top1 = summary_of(run)["val_top1"]
    assert top1 > 0.85
    assert f"{100 * top1:.2f} %" in in_process("eval", run).stdout


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.widths=[8]", "model.vote: must have one weight for each of the 1 layers, got 3"),
        ("data.image_size=3", "model: must fit images of 1x3x3, got: 10 labels do not fit into images of 9 numbers"),
        ("objective.threshold=0", "objective.threshold: must be > 0, got 0"),
    ],
)
def test_what_does_not_fit_is_refused(
    override: str, said: str, tiny_job: Callable[..., Path], in_process: Command
) -> None:
    done = in_process("check", tiny_job("ff", FF_JOB), "--set", override)
    assert done.returncode == EXIT_JOB
    assert said in done.stderr


@pytest.mark.slow
def test_two_replicas_train_the_same_network_but_for_rounding(
    tiny_job: Callable[..., Path], orchestrator: Command, tmp_path: Path
) -> None:
    text = FF_JOB.replace("epochs: 8", "steps: 5, precision: float64")
    for name, workers in (("one", 1), ("two", 2)):
        done = orchestrator("run", tiny_job(name, text), "--set", f"cluster.workers={workers}")
        assert done.returncode == EXIT_DONE, done.stderr
    one, two = (summary_of(tmp_path / "runs" / name) for name in ("one", "two"))
    assert one["order_sha256"] == two["order_sha256"]
    assert one["val_top1"] == pytest.approx(two["val_top1"], abs=1e-9)


def test_the_same_job_gives_the_same_bits(tiny_job: Callable[..., Path], in_process: Command, tmp_path: Path) -> None:
    text = FF_JOB.replace("epochs: 8", "steps: 20").replace("[200, 200, 200]", "[20, 20, 20]")
    for name in ("a", "b"):
        assert in_process("run", tiny_job(name, text)).returncode == EXIT_DONE
    assert_same_bits(tmp_path / "runs" / "a", tmp_path / "runs" / "b")


@pytest.mark.slow
def test_its_network_leaves_as_one_file_for_any_number_of_images(
    tiny_job: Callable[..., Path], in_process: Command, tmp_path: Path
) -> None:
    assert in_process("run", tiny_job("ff", FF_JOB.replace("epochs: 8", "steps: 5"))).returncode == EXIT_DONE
    done = in_process("export", tmp_path / "runs" / "ff", "--format", "torch-export")
    assert done.returncode == EXIT_DONE, done.stderr
    assert "differ from the run's network by at most" in done.stdout
