"""What the driver shows of an attempt is what its run folder says."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from orchestrator.run.folder import RunFolder, write_json
from orchestrator.show.follow import Follower
from tests.show.test_display import Terminal

PLAN = {
    "event": "plan", "layer_names": ["conv0", "conv1", "conv2"],
    "stages": [{"index": 0, "layers": [0, 1], "replicas": 1}, {"index": 1, "layers": [2, 2], "replicas": 2}],
}  # fmt: skip
START = {
    "event": "start", "step": 0, "steps_total": 54, "steps_per_epoch": 27, "epochs": 2, "samples_per_epoch": 1350,
}  # fmt: skip
FIRST = {"event": "first_step", "step": 1, "seconds": {"job": 0.44, "MLflow": 2.1, "workers": 5.31}}
EPOCH = {
    "event": "epoch", "epoch": 1, "step": 27, "images_per_second": 2159.0, "train_loss": [0.9, 0.794],
    "val_top1": 0.91, "layer_val_top1": [0.838, 0.9356, 0.916],
}  # fmt: skip
SHARES = {"busy_fraction": 0.5, "wait_input_fraction": 0.5, "wait_output_fraction": 0.0, "all_reduce_fraction": 0.0}


def followed(folder: RunFolder, out: io.StringIO, events: list[dict[str, Any]]) -> str:
    folder.append_event(PLAN)
    follower = Follower(folder.path, 2, out)
    for event in events:
        folder.append_event(event)
    follower.start()
    follower.stop()
    return out.getvalue()


def test_an_attempt_that_began_before_anyone_followed_is_shown_from_its_first_line(tmp_path: Path) -> None:
    folder, out = RunFolder(tmp_path), io.StringIO()
    folder.append_event(PLAN)
    _, since = folder.read_events()
    folder.append_event(START)
    follower = Follower(folder.path, 1, out, since)
    follower.start()
    follower.stop()
    assert out.getvalue() == "Training 54 steps, 2 epochs of 1350 images\n"


def test_the_lines_of_an_attempt_say_where_the_time_to_the_first_step_went(tmp_path: Path) -> None:
    warning = {"event": "warning", "text": "MLflow does not answer"}
    assert followed(RunFolder(tmp_path), io.StringIO(), [START, FIRST, EPOCH, warning]).splitlines() == [
        "Training 54 steps, 2 epochs of 1350 images",
        "First step after 7.8 s: job 0.4, MLflow 2.1, workers 5.3",
        "epoch   1/2  step     27     2159 images/s  loss 0.794  val 91.00 % (layers 83.8 93.6 91.6)  0 s left",
        "warning: MLflow does not answer",
    ]


@pytest.mark.parametrize(
    ("threads", "where"),
    [(0, "in the training thread"), (1, "1 loader thread a worker"), (3, "3 loader threads a worker")],
)
def test_an_attempt_says_who_decodes_its_images(tmp_path: Path, threads: int, where: str) -> None:
    start = START | {"loader": {"decoder": "pillow 11.0", "threads": threads}}
    assert followed(RunFolder(tmp_path), io.StringIO(), [start]).endswith(f"; decoder pillow 11.0, {where}\n")


def test_bars_show_this_attempt_and_nothing_that_an_earlier_one_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    folder = RunFolder(tmp_path)
    (tmp_path / "stages").mkdir()
    write_json(folder.stage_file(0), {"attempt": 2, **SHARES})
    write_json(folder.stage_file(1), {"attempt": 1, **SHARES})
    write_json(folder.progress, {"attempt": 2, "step": 30, "steps_total": 54, "phase": "evaluate"})
    shown = followed(folder, Terminal(), [START, EPOCH])
    assert "step 30/54  evaluate  " in shown
    assert " left  val 91.00 %, best layer 1 93.56 %" in shown
    assert "stage 0  conv0 .. conv1" in shown
    assert "50 % busy, waits 50 % for input" in shown
    assert "stage 1" not in shown, "that file is of the attempt before"


def test_a_torn_file_on_shared_storage_ends_nothing(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.progress.write_text('{"attempt": 2, "st')
    assert followed(folder, io.StringIO(), [START]) == "Training 54 steps, 2 epochs of 1350 images\n"
