"""Mixed images, averaged weights, a repeated batch and compiled layers in whole runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import hff
from orchestrator.errors import EXIT_DONE, EXIT_JOB
from orchestrator.run.device import compile_layers
from tests.conftest import Command
from tests.run.test_same_weights import assert_same_but_for_rounding, flags
from tests.runs import assert_same_bits, newest, summary_of, weights_sha256_of

RECIPE = (
    "train.ema_decay=0.9",
    "data.augment={crop_padding: 1, mixup: 0.4, cutmix: 1.0, color_jitter: {brightness: 0.2, contrast: 0.2}, "
    "rand_augment: {operations: 1, magnitude: 5}}",
)


@pytest.fixture
def trained(tiny_job: Callable[..., Path], in_process: Command, tmp_path: Path) -> Callable[..., Path]:
    """Runs the tiny job under another name, with the recipe unless told otherwise, and returns its folder."""

    def run(name: str, *settings: str, recipe: tuple[str, ...] = RECIPE) -> Path:
        result = in_process("run", tiny_job(name), *flags([*recipe, *settings]))
        assert result.returncode == EXIT_DONE, result.stdout + result.stderr
        return tmp_path / "runs" / name

    return run


def events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def test_a_pipeline_gives_the_bits_of_one_process_and_a_resumed_run_too(
    trained: Callable[..., Path], tmp_path: Path
) -> None:
    alone = trained("alone", "checkpoint.every_steps=5")
    assert summary_of(alone)["evaluated_weights"] == "averaged"
    assert_same_bits(trained("piped", "cluster.workers=2", "cluster.stages=2"), alone)
    # Back to the middle of the second epoch.
    resumed = tmp_path / "runs" / "resumed"
    shutil.copytree(alone, resumed)
    shutil.rmtree(newest(resumed))
    (resumed / "summary.json").unlink()
    job = resumed / "job.yaml"
    job.write_text(job.read_text().replace("name: alone", "name: resumed"))
    trained("resumed", "checkpoint.every_steps=5")
    assert_same_bits(resumed, alone)
    first, last = summary_of(resumed)["attempt_steps"][-1]
    assert (first, last) == (25, 28)


def test_replicas_share_mixed_batches_and_have_one_average(trained: Callable[..., Path]) -> None:
    settings = ("train.precision=float64", "train.global_batch_size=96")
    alone = trained("alone", *settings)
    meshed = trained("meshed", *settings, "cluster.workers=3", "cluster.replicas=[2, 1]", "cluster.stages=2")
    assert summary_of(meshed)["replicas"] == [2, 1]
    assert_same_but_for_rounding(meshed, alone)


def test_the_saved_and_evaluated_weights_are_the_average_not_those_that_learn(
    trained: Callable[..., Path], in_process: Command, tmp_path: Path
) -> None:
    run = trained("averaged", recipe=("train.ema_decay=0.9",))
    where = newest(run)
    weights = load_file(where / "layer_00.safetensors")
    learning = load_file(where / "layer_00.optim.safetensors")
    assert not weights["body.0.weight"].equal(learning["learning/body.0.weight"])
    plain = load_file(newest(trained("plain", recipe=())) / "layer_00.safetensors")
    assert plain["body.0.weight"].equal(learning["learning/body.0.weight"]), "the average changes no training"
    answer = tmp_path / "answer.json"
    assert in_process("eval", run, "--json", answer).returncode == EXIT_DONE
    assert json.loads(answer.read_text())["top1"] == summary_of(run)["val_top1"]
    assert summary_of(run)["weights_sha256"] == weights_sha256_of(run)


def test_a_settled_layer_of_a_sequential_run_is_its_average(trained: Callable[..., Path]) -> None:
    settings = ("train.schedule=sequential", "train.epochs=1", "checkpoint.keep_last=9")
    run = trained("one", *settings, recipe=("train.ema_decay=0.9",))
    at_end = load_file(newest(run) / "layer_00.safetensors")
    learning = load_file(newest(run) / "layer_00.optim.safetensors")
    assert at_end["body.0.weight"].equal(learning["learning/body.0.weight"])
    own_phase = load_file(sorted((run / "checkpoints").glob("step_*"))[0] / "layer_00.safetensors")
    assert at_end["body.0.weight"].equal(own_phase["body.0.weight"])


def test_a_repeated_batch_is_learned_by_heart_and_nothing_else_is_seen(trained: Callable[..., Path]) -> None:
    run = trained("overfit", "train.epochs=8", "data.augment={crop_padding: 1}", recipe=("data.repeat_batch=true",))
    summary = summary_of(run)
    assert summary["samples_seen"] > 5000
    epochs = [e for e in events(run) if e["event"] == "epoch"]
    assert epochs[-1]["train_top1"] == [1.0, 1.0, 1.0]
    assert len(set(summary["sample_keys_sha256"][:-1])) == 1, "every whole epoch has the same samples"
    assert summary["val_top1"] < 0.95, "a hundred images do not teach as much as all"


def test_growing_images_give_the_same_bits_in_a_pipeline(trained: Callable[..., Path]) -> None:
    growing = ("model.head_grid=2", "data.progressive={from_size: 4, until: 0.5}")
    alone = trained("alone", recipe=growing)
    assert_same_bits(trained("piped", "cluster.workers=2", "cluster.stages=2", recipe=growing), alone)
    constant = trained("constant", recipe=growing[:1])
    assert summary_of(constant)["weights_sha256"] != summary_of(alone)["weights_sha256"]


@pytest.mark.slow
def test_compiled_layers_learn_what_others_learn(trained: Callable[..., Path]) -> None:
    plain = trained("plain", recipe=())
    compiled = trained("compiled", "train.compile=true", recipe=())
    assert summary_of(compiled)["val_top1"] == pytest.approx(summary_of(plain)["val_top1"], abs=0.03)


@pytest.mark.slow
def test_more_layers_than_torch_compiles_by_default_are_all_compiled() -> None:
    """Torch's own limit of eight would leave the others as they are."""
    from torch._dynamo.utils import counters  # takes seconds, which the other tests here need not wait for

    options = hff.MlpOptions(widths=tuple(range(4, 14)))
    layers = hff.build_layers(options, (1, 2, 2), hff.HeadOptions(num_classes=2), seed=0)
    before = counters["stats"]["unique_graphs"]
    compile_layers(layers)
    x = torch.randn(8, 1, 2, 2)
    for layer in layers:
        x = layer(x).detach()
    assert counters["stats"]["unique_graphs"] - before == len(layers)


def test_without_a_compiler_compiling_is_refused(
    tiny_job: Callable[..., Path], in_process: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    done = in_process("run", tiny_job("compiled"), "--set", "train.compile=true")
    assert done.returncode == EXIT_JOB
    assert "train.compile: needs a C++ compiler on every worker (g++, clang++, c++), found none" in done.stderr
