"""What a plan promises: its numbers against arithmetic by hand, its choice against all choices, its refusals."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest

from hff.shapes import HeadShape, VggOptions, describe
from orchestrator.data.loading.order import steps_per_epoch
from orchestrator.errors import JobError
from orchestrator.pipeline.cost import CPU_CORE, PASSES, LayerCost, Target, layer_costs, learned
from orchestrator.pipeline.mesh import SLOTS
from orchestrator.pipeline.plan import Plan, make_plan
from orchestrator.pipeline.stage_cost import Load, StageCosts

SHAPES = describe(VggOptions(widths=(8, 16, 16, 32), pool_after=(0, 2)), (3, 16, 16), HeadShape("prototype", 10, 2))
# Links and sums that cost nothing: what is left is the time of the layers.
FREE = Target(1e9, math.inf, 0.0, math.inf, 0.0)


def plan(**arguments: Any) -> Plan:
    given: dict[str, Any] = {
        "workers": 1, "stages": "auto", "global_batch_size": 100, "num_samples": 1000, "num_classes": 10,
        "optimizer": "adamw",
    }  # fmt: skip
    return make_plan(arguments.pop("shapes", SHAPES), **{**given, **arguments})


def seconds(*per_sample: float) -> list[LayerCost]:
    return [LayerCost(s) for s in per_sample]


def test_a_plan_names_what_every_stage_owns_sends_and_costs() -> None:
    made = plan(workers=2, stages=2, global_batch_size=10, num_samples=95, costs=seconds(1, 1, 1, 3), target=FREE)
    value = made.to_json()
    assert [stage["layers"] for stage in value["stages"]] == [[0, 2], [3, 3]]
    assert [stage["compute_share"] for stage in value["stages"]] == [0.5, 0.5]
    assert value["steps_per_epoch"] == 10
    # The border is layer 2's map, 16 x 4 x 4 float32, and an int64 label, for 10 samples.
    assert value["stages"][0]["bytes_sent_per_step"] == 10 * (4 * 16 * 4 * 4 + 8)
    assert value["stages"][1]["bytes_sent_per_step"] == 0
    assert value["stages"][1]["parameters"] == 16 * 9 * 32 + 2 * 32 + 10 * 2 * 32 * 16 + 1
    assert all(stage["memory_bytes"] > 4 * 4 * stage["parameters"] for stage in value["stages"])
    assert value["workers"] == 2
    # Both stages take 30 s a step: one to fill, then ten steps.
    assert value["epoch_seconds"] == 11 * 30
    assert value["images_per_second"] == pytest.approx(95 / 330)
    assert value["worker_hours_per_epoch"] == pytest.approx(2 * 330 / 3600)
    assert value["efficiency"] == pytest.approx(10 / 11)
    assert value["limiting_factor"] == "filling"


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 6, 8, 12])
def test_stages_and_replicas_are_the_fastest_of_all(workers: int) -> None:
    """The reference tries every division and every number of replicas as a stated one."""
    costs = layer_costs(SHAPES, CPU_CORE)
    chosen = plan(workers=workers, costs=costs)
    assert sum(chosen.replicas) == workers
    rates = [
        plan(workers=workers, costs=costs, replicas=replicas).images_per_second
        for stages in range(1, 5)
        for replicas in itertools.product((1, 2, 4, 5, 10), repeat=stages)
        if sum(replicas) == workers
    ]
    # The choice is by the slowest stage; filling, once in an epoch, may differ.
    assert chosen.images_per_second == pytest.approx(max(rates), rel=0.02)


def test_a_layer_that_takes_three_times_as_long_gets_three_workers() -> None:
    made = plan(workers=6, costs=seconds(1, 3, 1, 1), global_batch_size=60, target=FREE, stages=4)
    assert made.replicas == [1, 3, 1, 1]
    assert made.efficiency == pytest.approx(17 / (17 + 3), abs=0.01), "17 steps, 3 to fill"
    even = plan(workers=6, costs=seconds(1, 3, 1, 1), global_batch_size=60, target=FREE, replicas=(2, 2, 1, 1))
    # 90 s instead of 60 s a step; one and a half of them to fill.
    assert even.images_per_second == pytest.approx(made.images_per_second * 60 * 20 / (90 * 17 + 150))
    assert (even.limiting_stage, even.limiting_factor) == (1, "uneven stages")


def test_losses_say_where_all_time_of_the_workers_goes() -> None:
    for replicas in ((4,), (2, 2), (1, 2, 1), (2, 5, 1, 1)):
        made = plan(workers=sum(replicas), replicas=replicas, num_samples=5000)
        useful = 50 * sum(cost.of_batch(100) for cost in layer_costs(SHAPES, CPU_CORE))
        assert made.efficiency == pytest.approx(useful / (made.workers * made.epoch_seconds))
        assert made.efficiency + sum(made.losses.values()) == pytest.approx(1)
        assert all(share >= 0 for share in made.losses.values())
        assert made.limiting_factor == max(made.losses, key=lambda name: made.losses[name])


def test_replicas_pay_for_their_sums_unless_the_next_layer_hides_them() -> None:
    target = Target(1e9, math.inf, 0.0, link_bytes_per_s=1e6, link_latency_s=0.0)
    # Half of the gradients' bytes go each way, twice, between two replicas.
    wire = [4 * learned(shape) / 1e6 for shape in SHAPES]
    slow = plan(workers=2, replicas=(2,), costs=seconds(1, 1, 1, 1), target=target, num_samples=100)
    assert slow.epoch_seconds == pytest.approx(4 * 50 + wire[3])
    fast = plan(workers=2, replicas=(2,), costs=seconds(1e-9, 1e-9, 1e-9, 1e-9), target=target, num_samples=100)
    assert fast.epoch_seconds == pytest.approx(sum(wire))
    assert fast.limiting_factor == "sums over replicas"


def test_a_sum_over_replicas_takes_a_tree_up_and_down_and_a_batch_norm_four_of_them() -> None:
    """Gradients hide behind the next layer, but for the last one's; what norms wait for hides behind nothing."""
    hop = 0.25
    for replicas, levels in ((2, 1), (4, 2), (5, 3)):
        target = replace(FREE, link_latency_s=hop)
        made = plan(workers=replicas, replicas=(replicas,), costs=seconds(1, 1, 1, 1), target=target, num_samples=100)
        tree = 2 * levels * hop
        assert made.epoch_seconds == pytest.approx(4 * 100 / replicas + tree + 4 * len(SHAPES) * tree)


def test_a_stage_sends_before_its_last_update_which_delays_nobody() -> None:
    costs = [LayerCost(1.0, step_s=10.0)] * 4
    made = plan(workers=2, layers=(2, 2), global_batch_size=10, num_samples=100, costs=costs, target=FREE)
    # A stage takes 2 (10 + 10) s a step, of which its last update, 10 s, comes behind the send.
    assert made.epoch_seconds == pytest.approx((40 - 10) + 10 * 40)


def test_what_is_sent_and_what_is_summed_share_a_link() -> None:
    load = Load(SHAPES, seconds(0, 0, 0, 0), batch=100, num_classes=10)
    stage = StageCosts(load, replace(FREE, link_bytes_per_s=1000.0), [2]).stage(1, 2, 0)
    # Of two replicas each has 50 samples, and half of the gradients' bytes go each way, twice.
    gradients = 4 * (learned(SHAPES[1]) + learned(SHAPES[2]))
    assert stage.out_s == pytest.approx((50 * (4 * 16 * 4 * 4 + 8) + gradients) / 1000)
    assert stage.in_s == pytest.approx((50 * (4 * 8 * 8 * 8 + 8) + gradients) / 1000)


def test_a_link_that_is_slower_than_the_stages_sets_the_pace() -> None:
    target = replace(FREE, link_bytes_per_s=1000.0)
    made = plan(workers=2, stages=2, costs=seconds(1e-3, 1e-3, 1e-3, 1e-3), target=target)
    sent = [stage.bytes_sent_per_step for stage in made.stages]
    assert made.stages[0].layers == (0, 2), "the border with the smallest map"
    assert made.epoch_seconds == pytest.approx(10 * sent[0] / 1000, rel=0.01)
    assert made.limiting_factor == "links"


def test_a_stage_that_waits_for_its_link_limits_more_than_one_that_works_longer() -> None:
    costs, target = seconds(1e-3, 1e-3, 1, 1), replace(FREE, link_bytes_per_s=1000.0)
    made = plan(workers=3, layers=(1, 1, 2), costs=costs, target=target)
    assert made.limiting_factor == "links"
    assert made.limiting_stage == 1, "its map is the largest that is sent"


@pytest.mark.parametrize("samples", [1, 2, 99, 100, 101, 102, 999, 1000, 1001, 1002])
def test_an_epoch_has_the_steps_that_the_loader_makes(samples: int) -> None:
    assert plan(num_samples=samples).steps_per_epoch == steps_per_epoch(samples, 100)[0]


def test_activations_of_half_size_send_half_the_bytes_beside_the_labels() -> None:
    made = plan(workers=2, stages=2, global_batch_size=10, costs=seconds(1, 1, 1, 3), target=FREE, activation_bytes=2)
    assert made.stages[0].bytes_sent_per_step == 10 * (2 * 16 * 4 * 4 + 8)


def test_memory_is_weights_gradients_optimizer_activations_and_buffers() -> None:
    made = plan(workers=2, stages=2, costs=seconds(1, 1, 1, 3), global_batch_size=10)
    last = SHAPES[3]
    numbers = 4 * learned(last) + last.buffers
    kept = 16 * 4 * 4 + 3 * 32 * 4 * 4 + last.head_features + 2 * 10
    assert made.stages[1].memory_bytes == 4 * (numbers + 10 * kept) + SLOTS * 10 * (4 * 16 * 4 * 4 + 8)
    # Of several layers the activations of the largest: when it is done, they are freed.
    maps = [(3 * 16 * 16, 8 * 16 * 16), (8 * 8 * 8, 16 * 8 * 8), (16 * 8 * 8, 16 * 8 * 8)]
    largest = max(i + 3 * o + s.head_features + 2 * 10 for (i, o), s in zip(maps, SHAPES[:3], strict=True))
    numbers = sum(4 * learned(shape) + shape.buffers for shape in SHAPES[:3])
    assert made.stages[0].memory_bytes == 4 * (numbers + 10 * largest) + SLOTS * 10 * (4 * 16 * 4 * 4 + 8)
    halved = plan(workers=2, replicas=(2,), costs=seconds(1, 1, 1, 3), global_batch_size=10)
    assert halved.stages[0].memory_bytes < plan(costs=seconds(1, 1, 1, 3), global_batch_size=10).stages[0].memory_bytes


def test_the_plan_keeps_to_the_limit_of_memory_at_the_price_of_speed() -> None:
    costs = seconds(1e-5, 1e-5, 1e-5, 1e-5)
    free = plan(workers=2, costs=costs)
    assert free.replicas == [1, 1]
    largest = max(stage.memory_bytes for stage in free.stages)
    assert plan(workers=2, costs=costs, memory_limit_bytes=largest) == free
    lean = plan(workers=2, costs=costs, memory_limit_bytes=largest - 1)
    assert max(stage.memory_bytes for stage in lean.stages) < largest
    assert lean.images_per_second < free.images_per_second


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"workers": 5, "stages": 5}, "cluster.stages: must be at most 4, the number of layers, got 5"),
        ({"workers": 3, "stages": 4}, "cluster.workers: must be at least cluster.stages (4), got 3; nearest: 4"),
        (
            {"workers": 7, "stages": 1},
            "cluster.workers: 7 workers cannot be shared out over 1 stage whose replicas divide "
            "train.global_batch_size (100); nearest: 5 and 10",
        ),
        (
            {"workers": 13, "global_batch_size": 7},
            "cluster.workers: 13 workers cannot be shared out over at most 4 stages whose replicas divide "
            "train.global_batch_size (7); nearest: 10 and 14",
        ),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_with_the_remedy(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(JobError) as caught:
        plan(**arguments)
    assert str(caught.value) == message
    assert caught.value.exit_code == 2


def test_as_few_micro_batches_as_the_memory_allows() -> None:
    def largest(parts: int | str, limit: float | None = None) -> tuple[int, int]:
        made = plan(global_batch_size=64, micro_batches=parts, memory_limit_bytes=limit)
        return made.micro_batches, made.stages[0].memory_bytes

    needed = {parts: largest(parts)[1] for parts in (1, 2, 4, 8)}
    # In parts: all but a layer's input, and its output in parts and put together.
    maps = [(3 * 16**2, 8 * 16**2, 8 * 8**2), (8 * 8**2, 16 * 8**2, 16 * 8**2), (16 * 8**2, 16 * 8**2, 16 * 4**2)]
    heads = [shape.head_features + 2 * 10 for shape in SHAPES]
    whole = max(i + 3 * wide + head for (i, wide, _), head in zip(maps, heads, strict=False))
    in_parts = max(i + 2 * out + (3 * wide + head) / 4 for (i, wide, out), head in zip(maps, heads, strict=False))
    assert needed[1] - needed[4] == pytest.approx(4 * 64 * (whole - in_parts))
    assert needed[1] > needed[2] > needed[4] > needed[8]
    for parts in (1, 2, 4, 8):
        assert largest("auto", needed[parts]) == (parts, needed[parts])
    with pytest.raises(JobError, match="no split of the 4 layers among 1 workers fits"):
        largest("auto", needed[8] / 2)
    with pytest.raises(JobError, match="no split of the 4 layers among 1 workers fits"):
        largest("auto", largest(64)[1])  # parts of one sample: no batch norm has a variance of these
    with pytest.raises(
        JobError, match=r"what would fit: .* GB each, or train.micro_batches 4, or train.global_batch_size"
    ):
        largest(1, needed[4])


def test_a_stated_number_of_layers_for_each_stage_is_what_the_stages_get() -> None:
    costs = seconds(1, 1, 1, 1)
    made = plan(workers=3, costs=costs, layers=(1, 3), target=FREE)
    assert [stage.layers for stage in made.stages] == [(0, 0), (1, 3)]
    assert made.replicas == [1, 2], "the longer stage gets the worker more"
    assert [s.layers for s in plan(workers=2, costs=costs, layers=(3, 1)).stages] == [(0, 2), (3, 3)]
    with pytest.raises(JobError, match=r"cluster.layers: must add up to 4, the number of layers, got 5"):
        plan(workers=2, layers=(4, 1))


def test_every_micro_batch_more_costs_each_layer_its_overhead() -> None:
    target = replace(FREE, overhead_s=0.5)
    whole, parts = (plan(costs=seconds(1, 1, 1, 1), target=target, micro_batches=n).epoch_seconds for n in (1, 4))
    assert parts - whole == pytest.approx(10 * 4 * 3 * 0.5)


def test_an_estimate_is_the_arithmetic_and_the_bytes_of_a_step() -> None:
    """Forward and weight gradient of the body, its input gradient too where it trains as a whole; all of the head."""
    shape = describe(VggOptions(widths=(8,)), (3, 16, 16), HeadShape("prototype", 10, 2, aux_convs=1))[0]
    arithmetic = Target(1.0, math.inf, 0.0, math.inf, 0.0)
    (local,), (whole,) = (layer_costs((shape,), arithmetic, end_to_end=e) for e in (False, True))
    assert local.sample_s == pytest.approx(2 * shape.forward_flops + 3 * shape.head_flops)
    assert whole.sample_s == pytest.approx(3 * shape.forward_flops + 3 * shape.head_flops)
    moved = replace(arithmetic, flops_per_s=math.inf, bytes_per_s=1.0, overhead_s=7.0)
    for optimizer, states in (("adamw", 2), ("sgd", 1)):
        (cost,) = layer_costs((shape,), moved, optimizer=optimizer)
        assert cost.sample_s == pytest.approx(4 * PASSES * (8 * 16 * 16 + shape.head_activations))
        # Weights and states are read and written, gradients read.
        assert cost.step_s == pytest.approx(7 + 4 * (3 + 2 * states) * learned(shape))


def test_a_plan_that_exceeds_memory_on_every_split_says_what_would_fit() -> None:
    leanest = min(
        max(stage.memory_bytes for stage in plan(workers=2, replicas=replicas).stages) for replicas in ((1, 1), (2,))
    )
    with pytest.raises(JobError, match=r"^cluster.memory_gb: no split of the 4 layers among 2 workers fits") as caught:
        plan(workers=2, memory_limit_bytes=0.9 * leanest)
    text = str(caught.value)
    assert "the leanest needs 0.00" in text
    assert caught.value.exit_code == 2
    _, _, remedies = text.partition("what would fit: ")
    _, parts, batch, workers = remedies.split(", or ")
    plan(workers=2, memory_limit_bytes=0.9 * leanest, micro_batches=int(parts.split()[-1]))
    plan(workers=2, memory_limit_bytes=0.9 * leanest, global_batch_size=int(batch.split()[-1]))
    plan(workers=int(workers.split()[0]), memory_limit_bytes=0.9 * leanest)
