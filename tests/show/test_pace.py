"""The end of a run says what bound it, by the times that it measured, and what to change."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.run.records.tracking import epoch_metrics
from orchestrator.show.pace import pace

START = {"event": "start", "step": 0}
REMOTE = {"hits": 9, "misses": 1, "bytes": 10, "retries": 0, "damaged": 0, "wait_s": 7.0}


def epoch(wait: float, *busy: float, **more: Any) -> dict[str, Any]:
    return {
        "event": "epoch", "wait_input_fraction": [wait, *[0.0] * (len(busy) - 1)], "busy_fraction": list(busy),
        "remote": None, "loader": {"threads": 2, "images": 1000, "decode_s": 2.5, "load_s": 10.0}, "skipped": {},
    } | more  # fmt: skip


@pytest.mark.parametrize(
    ("event", "beginning", "remedy"),
    [
        (epoch(0.43, 0.57), "Bound by data: training waits 43 % of its time for images; decoding takes "
         "2.5 ms an image (loader threads of all workers: 2)", "data.loader_threads"),
        (epoch(0.43, 0.57, remote=REMOTE), "Bound by the network: training waits 43 % of its time for images, and "
         "loading spends 70 % of its own on waiting for shards", "data.cache.max_bytes"),
        (epoch(0.43, 0.57, remote=REMOTE | {"wait_s": 1.0}), "Bound by data: ", "data.loader_threads"),
        (epoch(0.43, 0.57, loader=None), "Bound by data: training waits 43 % of its time for images. ", "auto"),
        (epoch(0.02, 0.6, 0.97), "Bound by computing: stage 1 computes 97 % of the time, training waits 2 %",
         "orchestrator plan JOB --workers"),
        (epoch(0.02, 0.98), "Bound by computing: training computes 98 %", "orchestrator plan JOB --workers"),
        (epoch(0.02, 0.5, 0.6), "Bound by the links between workers: no stage computes more than 60 %", "fewer stages"),
    ],
    ids=["decoding", "network", "remote but quick", "before times were kept", "slow stage", "one stage", "links"],
)  # fmt: skip
def test_a_run_says_what_bounds_it_and_what_to_change(event: dict[str, Any], beginning: str, remedy: str) -> None:
    said = pace([START, event])
    assert said is not None
    assert said.startswith(beginning)
    assert remedy in said


def test_only_the_settled_epochs_of_the_last_attempt_count() -> None:
    computing, waiting = epoch(0.01, 0.99), epoch(0.9, 0.1)
    assert str(pace([START, waiting, waiting, START, waiting, computing, computing])).startswith("Bound by computing")
    assert str(pace([START, computing, START, waiting])).startswith("Bound by data")


@pytest.mark.parametrize("full", [False, True])
def test_more_workers_are_not_advised_where_every_core_of_the_machine_has_one(full: bool) -> None:
    said = str(pace([{**START, "machine_full": full}, epoch(0.0, 0.9)]))
    assert ("More workers make it faster" in said) != full
    assert ("more machines make it faster" in said) == full


@pytest.mark.parametrize(("workers", "cores", "bound"), [(4, 2, "cores of this"), (2, 2, "links"), (4, None, "links")])
def test_workers_that_share_cores_are_not_said_to_wait_for_links(workers: int, cores: int | None, bound: str) -> None:
    said = str(pace([{**START, "workers": workers, "cores": cores}, epoch(0.02, 0.3, 0.4)]))
    assert said.startswith(f"Bound by the {bound}")
    assert ("4 workers share 2 of them" in said) == (bound != "links")


def test_nothing_is_said_before_an_epoch_has_ended() -> None:
    assert pace([]) is None
    assert pace([START, epoch(0.1, 0.9), START]) is None


def test_mlflow_gets_decode_time_and_left_out_images() -> None:
    line = epoch(0.25, 0.75, skipped={"damaged jpg": 2, "empty file": 1}) | {
        "train_loss": [1.0], "images_per_second": 1.0, "learning_rate": 0.1, "val_top1": None, "val_top5": None,
        "layer_val_top1": None,
    }  # fmt: skip
    metrics = epoch_metrics(line)
    found = {name: value for name, value in metrics.items() if name.startswith("data/")}
    assert found == {"data/decode_ms": 2.5, "data/skipped_samples": 3.0}
    old = {name: value for name, value in line.items() if name not in ("loader", "skipped")}
    assert "data/decode_ms" not in epoch_metrics(old)
