"""Which stage is named as the slow one, and with what remedy."""

from __future__ import annotations

import pytest

from orchestrator.pipeline.advice import Advice, StageTime, advise

NAMES = ["conv0", "conv1", "conv2", "conv3"]


def stage(
    layers: tuple[int, int], layer_s: tuple[float, ...], replicas: int = 1, *, images: float = 0.0, sums: float = 0.0
) -> StageTime:
    """A stage over 100 s whose layers take so long; it waits for what follows in the rest of the time."""
    rest = 100 - sum(layer_s) - images - sums
    return StageTime(layers, replicas, 100.0, images, rest, sums, layer_s)


def advice(*stages: StageTime, batch: int = 64) -> Advice:
    found = advise(stages, batch, NAMES)
    assert found is not None
    return found


def test_even_stages_get_no_advice() -> None:
    assert advise([stage((0, 1), (50.0, 48.0)), stage((2, 3), (45.0, 45.0))], 64, NAMES) is None
    assert advise([stage((0, 3), (20.0, 30.0, 20.0, 20.0))], 64, NAMES) is None


def test_a_layer_goes_to_the_neighbour_where_that_helps_most() -> None:
    # 40 and 80 against 90 and 60.
    found = advice(stage((0, 0), (50.0,)), stage((1, 2), (40.0, 60.0)), stage((3, 3), (20.0,)))
    assert found.stage == 1
    assert found.text == (
        "Stage 1 (conv1 .. conv2) sets the pace: it works 100 % of the time, the others 35 %. "
        "Move layer 2 (conv2) to stage 2 (cluster.layers: [1, 1, 2]): about 1.25x the images/s."
    )
    # 70 and 60 against 40 and 120.
    other = advice(stage((0, 0), (30.0,)), stage((1, 2), (40.0, 60.0)), stage((3, 3), (60.0,)))
    assert "Move layer 1 (conv1) to stage 0 (cluster.layers: [2, 1, 1]): about 1.43x" in other.text


def test_a_stage_of_one_layer_gets_replicas_that_share_the_batch() -> None:
    found = advice(stage((0, 1), (10.0, 20.0)), stage((2, 2), (96.0,)), batch=9)
    assert found.text.endswith(
        "Give it 3 replicas (cluster.workers: 4, cluster.replicas: [1, 3]): at most 3.00x the images/s."
    )
    assert "train.global_batch_size" in advice(stage((0, 1), (10.0, 20.0)), stage((2, 2), (96.0,)), batch=1).text


def test_a_layer_is_not_moved_to_where_it_would_be_no_faster() -> None:
    found = advice(stage((0, 0), (70.0,)), stage((1, 2), (10.0, 88.0)), stage((3, 3), (70.0,)))
    assert "Move layer 1 (conv1) to stage 0 (cluster.layers: [2, 1, 1]): about 1.11x" in found.text
    # One worker would take twice as long for it as the two that have it now.
    alone = advice(stage((0, 0), (50.0,)), stage((1, 2), (40.0, 60.0), 2), stage((3, 3), (20.0,)))
    assert "Give it 4 replicas (cluster.workers: 6, cluster.replicas: [1, 4, 1])" in alone.text
    nothing = advice(stage((0, 0), (70.0,)), stage((1, 2), (49.0, 49.0)), stage((3, 3), (70.0,)))
    assert "Give it 2 replicas (cluster.workers: 4, cluster.replicas: [1, 2, 1])" in nothing.text


def test_sums_over_replicas_are_not_cured_by_more_replicas() -> None:
    found = advice(stage((0, 0), (30.0,)), stage((1, 1), (20.0,), 4, sums=75.0))
    assert found.stage == 1
    assert found.text.endswith(
        "It mostly waits for sums over its replicas: fewer of them, a larger batch or a faster link would help."
    )


@pytest.mark.parametrize("stages", [1, 2])
def test_data_that_come_too_late_are_named_before_any_stage(stages: int) -> None:
    both = (stage((0, 1), (20.0, 20.0), images=60.0), stage((2, 3), (40.0, 10.0)))
    found = advice(*both[:stages])
    assert found.stage == 0
    assert found.text.startswith("Stage 0 waits for images 60 % of the time: reading and decoding set the pace")


def test_more_workers_than_cores_of_the_one_machine_are_not_advised() -> None:
    slow = [stage((0, 1), (10.0, 20.0)), stage((2, 2), (96.0,))]
    full, room = advise(slow, 9, NAMES, 2), advise(slow, 9, NAMES, 3)
    assert full is not None and full.text.endswith("a worker: more workers need more machines.")
    assert room is not None and "Give it 3 replicas" in room.text
    starved = advise([stage((0, 3), (20.0,), images=50.0)], 9, NAMES, 1)
    assert starved is not None and "replica" not in starved.text
