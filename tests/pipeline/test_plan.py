"""The planner against brute force, its numbers against arithmetic by hand, its refusals word for word."""

from __future__ import annotations

import itertools
import random

import pytest

from hff.shapes import HeadShape, VggOptions, describe
from orchestrator.errors import JobError
from orchestrator.pipeline.mesh import Mesh
from orchestrator.pipeline.plan import choose_stages, make_plan, split

SHAPES = describe(VggOptions(widths=(8, 16, 16, 32), pool_after=(0, 2)), (3, 16, 16), HeadShape("prototype", 10, 2))


def test_the_split_is_as_good_as_the_best_of_all_splits() -> None:
    dice = random.Random(0)
    for _ in range(200):
        layers = dice.randint(1, 8)
        stages = dice.randint(1, layers)
        costs = [dice.random() for _ in range(layers)]
        ranges = split(costs, stages)
        assert [i for first, last in ranges for i in range(first, last + 1)] == list(range(layers))
        best = min(
            max(sum(costs[a:b]) for a, b in itertools.pairwise((0, *cuts, layers)))
            for cuts in itertools.combinations(range(1, layers), stages - 1)
        )
        assert max(sum(costs[first : last + 1]) for first, last in ranges) == pytest.approx(best)


def test_a_plan_names_what_every_stage_owns_sends_and_costs() -> None:
    plan = make_plan(
        SHAPES, workers=2, stages=2, global_batch_size=10, num_samples=95, num_classes=10, optimizer="adamw",
        costs=(1.0, 1.0, 1.0, 3.0),
    )  # fmt: skip
    value = plan.to_json()
    assert [stage["layers"] for stage in value["stages"]] == [[0, 2], [3, 3]]
    assert [stage["compute_share"] for stage in value["stages"]] == [0.5, 0.5]
    assert value["steps_per_epoch"] == 10
    # The border is layer 2's map, 16 x 4 x 4 float32, and an int64 label, for 10 samples.
    assert value["stages"][0]["bytes_sent_per_step"] == 10 * (4 * 16 * 4 * 4 + 8)
    assert value["stages"][1]["bytes_sent_per_step"] == 0
    assert value["stages"][1]["parameters"] == 16 * 9 * 32 + 2 * 32 + 10 * 2 * 32 * 16 + 1
    assert (value["workers"], value["balance"]) == (2, 1.0)
    assert all(stage["memory_bytes"] > 4 * 4 * stage["parameters"] for stage in value["stages"])


def test_stages_are_chosen_to_divide_the_workers() -> None:
    assert [choose_stages(workers, "auto", 4) for workers in (1, 2, 3, 4, 6, 7, 8)] == [1, 2, 3, 4, 3, 1, 4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"workers": 5, "stages": 5}, "cluster.stages: must be at most 4, the number of layers, got 5"),
        (
            {"workers": 3, "stages": 2},
            "cluster.workers: must be a multiple of cluster.stages (2), got 3 (nearest: 2 or 4)",
        ),
        (
            {"workers": 4, "stages": 1, "global_batch_size": 7},
            "train.global_batch_size: must be at least 8, two samples for each of the 4 replicas, got 7",
        ),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_with_the_remedy(arguments: dict[str, int], message: str) -> None:
    given = {"global_batch_size": 100, **arguments}
    with pytest.raises(JobError) as caught:
        make_plan(SHAPES, num_samples=1000, num_classes=10, optimizer="sgd", **given)
    assert str(caught.value) == message
    assert caught.value.exit_code == 2


def test_ranks_and_places_are_inverse_and_a_pipeline_has_consecutive_ranks() -> None:
    mesh = Mesh(stages=3, replicas=2)
    assert [mesh.place(r) for r in range(6)] == [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)]
    assert all(mesh.rank(*mesh.place(r)) == r for r in range(6))
    assert [mesh.before(r) for r in range(6)] == [None, 0, 1, None, 3, 4]
    assert [mesh.after(r) for r in range(6)] == [1, 2, None, 4, 5, None]
    with pytest.raises(ValueError, match="rank 6"):
        mesh.place(6)
