"""The same job gives the same bits however it is spread over workers, launchers and interruptions."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from safetensors.torch import load_file

from orchestrator.cli import main
from tests.conftest import Command, started
from tests.pipeline.ranks import start_process
from tests.processes import Descendants, free_port
from tests.runs import assert_same_bits, layer_files, newest, summary_of, wait_for_step


@pytest.fixture
def trained(
    tiny_job: Callable[..., Path], in_process: Command, orchestrator: Command, tmp_path: Path
) -> Callable[..., Path]:
    """Runs the tiny job under another name and returns its run folder; with a `prefix` in a process of its own."""

    def run(name: str, *settings: str, prefix: tuple[str, ...] = ()) -> Path:
        command = ("run", tiny_job(name), *flags(settings))
        result = orchestrator(*command, prefix=prefix) if prefix else in_process(*command)
        assert result.returncode == 0, result.stdout + result.stderr
        return tmp_path / "runs" / name

    return run


def flags(settings: Sequence[str]) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


TWO = ("cluster.workers=2", "cluster.stages=2")


def _rank(rank: int, port: int, words: Sequence[str]) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()} | {"GLOO_SOCKET_IFNAME": "lo"})
    sys.exit(main(list(words)))


def test_one_worker_two_stages_and_two_ranks_give_the_same_bits_and_another_seed_others(
    trained: Callable[..., Path], tiny_job: Callable[..., Path], tmp_path: Path
) -> None:
    """The ranks find in their environment what torchrun puts there."""
    alone = trained("alone")
    piped = trained("piped", *TWO)
    words = ("run", str(tiny_job("launched")), *flags(TWO))
    port = free_port()
    ranks = [start_process(_rank, rank, port, words) for rank in (0, 1)]
    for rank in ranks:
        rank.join(120)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    reference = summary_of(alone)
    for other in (piped, tmp_path / "runs" / "launched"):
        assert_same_bits(other, alone)
    assert summary_of(piped)["stages"] == 2
    assert [layer["stage"] for layer in summary_of(piped)["layers"]] != [0, 0, 0]
    other_seed = summary_of(trained("other", "train.seed=1"))
    assert other_seed["weights_sha256"] != reference["weights_sha256"]
    assert other_seed["order_sha256"] != reference["order_sha256"]


def test_links_of_bfloat16_change_the_layers_behind_them_alone(trained: Callable[..., Path]) -> None:
    links = (*TWO, "cluster.layers=[1, 2]", "cluster.transport=gloo", "train.link_precision=bfloat16")
    rounded, exact = trained("rounded", *links), trained("exact")
    ours, theirs = layer_files(rounded), layer_files(exact)
    same = [name for name in theirs if ours[name] == theirs[name]]
    assert same == ["layer_00.optim.safetensors", "layer_00.safetensors"]
    assert summary_of(rounded)["order_sha256"] == summary_of(exact)["order_sha256"]
    assert abs(summary_of(rounded)["val_top1"] - summary_of(exact)["val_top1"]) < 0.02


@pytest.mark.slow
def test_torchrun_gives_the_bits_of_one_worker(trained: Callable[..., Path]) -> None:
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    assert_same_bits(trained("launched", *TWO, prefix=torchrun), trained("alone"))


def assert_same_but_for_rounding(run: Path, other: Path) -> None:
    """Order of consumption and accuracy the same, every tensor to 1e-9 of its largest value."""
    ours, theirs = summary_of(run), summary_of(other)
    for key in ("order_sha256", "sample_keys_sha256", "steps", "samples_seen", "val_top1"):
        assert ours[key] == theirs[key], key
    assert [layer["val_top1"] for layer in ours["layers"]] == [layer["val_top1"] for layer in theirs["layers"]]
    for file in sorted(newest(other).glob("layer_??.safetensors")):
        values, expected = load_file(newest(run) / file.name), load_file(file)
        assert values.keys() == expected.keys()
        for key, value in expected.items():
            difference = (values[key].double() - value.double()).abs().max()
            assert difference <= 1e-9 * value.abs().max(), f"{file.name} {key}: {difference}"


FLOAT64 = ("train.precision=float64", "train.global_batch_size=96")


def test_replicas_of_one_stage_agree_with_one_process_to_the_order_of_sums(trained: Callable[..., Path]) -> None:
    settings = (*FLOAT64, "objective={name: bp}")
    alone = trained("alone", *settings)
    together = trained("together", *settings, "cluster.workers=2")
    assert summary_of(together)["replicas"] == [2]
    assert_same_but_for_rounding(together, alone)


def test_a_run_goes_on_with_more_workers_than_before_and_unequal_replicas(
    trained: Callable[..., Path], tiny_job: Callable[..., Path], tmp_path: Path
) -> None:
    """Batch norms and a ragged last batch; the first epoch by one worker, the second by three."""
    settings = (*FLOAT64, "model.vote=fitted")
    alone = trained("alone", *settings)
    run = tmp_path / "runs" / "meshed"
    shutil.copytree(alone, run)
    shutil.rmtree(newest(run))
    for left in ("summary.json", "outcome.json"):
        (run / left).unlink(missing_ok=True)
    edit(run / "job.yaml", "name: alone", "name: meshed")
    meshed = trained("meshed", *settings, "cluster.workers=3", "cluster.replicas=[2, 1]", "cluster.stages=2")
    assert_same_but_for_rounding(meshed, alone)
    summary = summary_of(meshed)
    assert (summary["replicas"], summary["stages"], summary["world_size"]) == ([2, 1], 2, 3)
    assert len(summary["peak_memory_bytes"]) == 3
    steps = summary["steps"]
    assert summary["attempt_steps"][-1] == [steps // 2, steps], "the first epoch was not done again"


def test_dropout_is_the_same_in_a_pipeline_and_after_an_interruption(
    trained: Callable[..., Path], tmp_path: Path
) -> None:
    settings = ("model={arch: mlp, widths: [16, 16], dropout: 0.3}",)
    alone = trained("alone", *settings)
    assert_same_bits(trained("piped", *settings, *TWO), alone)
    run = tmp_path / "runs" / "again"
    shutil.copytree(alone, run)
    shutil.rmtree(newest(run))
    for left in ("summary.json", "outcome.json"):
        (run / left).unlink()
    edit(run / "job.yaml", "name: alone", "name: again")
    assert_same_bits(trained("again", *settings), alone)
    assert summary_of(run)["attempts"] == 2


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_a_sequential_run_trains_one_layer_after_the_other_also_as_a_pipeline(trained: Callable[..., Path]) -> None:
    settings = ("train.schedule=sequential", "train.epochs=1")
    alone = trained("one", *settings)
    piped = trained("two", *settings, "cluster.workers=2", "cluster.stages=2")
    assert summary_of(alone)["steps"] == 3 * 14
    assert summary_of(piped)["weights_sha256"] == summary_of(alone)["weights_sha256"]
    assert all(layer["val_top1"] > 0.5 for layer in summary_of(piped)["layers"])
    lines = [json.loads(line) for line in (piped / "events.jsonl").read_text().splitlines()]
    epochs = [line for line in lines if line["event"] == "epoch"]
    for phase in (0, 1):
        assert epochs[phase]["val_top1"] == epochs[phase]["layer_val_top1"][phase], "the last trained layer decides"


def test_a_run_that_was_killed_between_its_last_save_and_its_summary_ends_without_a_step(
    trained: Callable[..., Path],
) -> None:
    run = trained("done", "model.vote=fitted")
    whole = summary_of(run)
    for left in ("summary.json", "outcome.json"):
        (run / left).unlink(missing_ok=True)
    steps = whole["steps"]
    again = summary_of(trained("done", "model.vote=fitted"))
    measured = dict.fromkeys(("images_per_second", "pipeline_efficiency", "peak_memory_bytes", "wall_seconds"))
    expected = whole | {"attempts": 2, "attempt_steps": [[0, steps], [steps, steps]]}
    assert again | measured == expected | measured
    assert len(set(again["vote_weights"])) > 1, "fitted ones, which the checkpoint has"


def test_a_run_begins_with_the_weights_of_another_and_nothing_else_of_it(trained: Callable[..., Path]) -> None:
    first = trained("first", "train.epochs=1")
    second = trained("second", "train.init_from=first", "train.epochs=1", "train.lr=1e-9")
    ours, theirs = summary_of(second), summary_of(first)
    for key in ("samples_seen", "order_sha256", "sample_keys_sha256", "attempt_steps"):
        assert ours[key] == theirs[key], key
    for file in sorted(newest(first).glob("layer_??.safetensors")):
        learned = load_file(newest(second) / file.name)
        for name, value in load_file(file).items():
            if "running" not in name and "num_batches" not in name:  # norms go on with their averages
                assert (learned[name] - value).abs().max() < 1e-5, name
    steps = [v for k, v in load_file(newest(second) / "layer_00.optim.safetensors").items() if k.endswith("/step")]
    assert {float(step) for step in steps} == {14.0}, "the optimizer began anew"


@pytest.mark.parametrize("schedule", ["simultaneous", "sequential"])
def test_bfloat16_gives_the_same_bits_in_a_pipeline_and_keeps_float32_weights(
    trained: Callable[..., Path], schedule: str
) -> None:
    settings = ("train.precision=bfloat16", "train.epochs=1", f"train.schedule={schedule}")
    alone = trained("alone", *settings)
    assert_same_bits(trained("piped", *settings, *TWO), alone)
    weights = load_file(newest(alone) / "layer_01.safetensors")
    assert {str(value.dtype) for value in weights.values() if value.is_floating_point()} == {"torch.float32"}


# Two epochs of 673 steps: a stop just at an epoch's end would prove nothing.
LONG = ("train.epochs=2", "train.global_batch_size=2", "train.lr=1e-3", "cluster.workers=2", "cluster.stages=2")


def test_a_run_stopped_twice_in_mid_epoch_exits_75_and_goes_on_to_the_same_weights(
    trained: Callable[..., Path], tiny_job: Callable[..., Path], tmp_path: Path
) -> None:
    """First by Ctrl-C, which comes to every process of the terminal's group, then by SIGTERM to the driver alone."""
    whole = trained("whole", *LONG, "cluster.workers=1", "cluster.stages=1")
    run = tmp_path / "runs" / "stopped"
    command = ("run", tiny_job("stopped"), *flags(LONG))
    step = 0
    for number, send in ((signal.SIGINT, os.killpg), (signal.SIGTERM, os.kill)):
        with started(*command) as process, Descendants(process.pid) as descendants:
            wait_for_step(run, step + 20)
            send(process.pid, number)
            output, errors = process.communicate(timeout=120)
        assert process.returncode == 75, output + errors
        assert f"{number.name}: saving at the end of this step" in output
        assert "run the same command again to go on" in errors
        assert "Traceback" not in output + errors
        assert len(descendants.seen) >= 3, "the driver and two workers"
        assert descendants.left() == []
        step = json.loads((run / "progress.json").read_text())["step"]
        assert step % 673 != 0, "stopped at an epoch's end: the test proves nothing"
    assert trained("stopped", *LONG) == run
    assert_same_bits(run, whole)
    resumed = summary_of(run)
    (first, stopped), (went_on, stopped_again), (went_on_again, last) = resumed["attempt_steps"]
    assert 0 == first < stopped == went_on < stopped_again == went_on_again == step < last == 2 * 673
    assert resumed["samples_seen"] == summary_of(whole)["samples_seen"]
    assert resumed["attempts"] == 3
    assert resumed["run_id"] is not None
