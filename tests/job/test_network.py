"""What a job says of its network without building it."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.job.network import (
    head_shape,
    known_classes,
    known_train_samples,
    layer_shapes,
    locality,
    units,
)


def test_the_layers_of_a_job_have_the_shapes_of_its_images(load: Any) -> None:
    shapes = layer_shapes(load(), 7)
    assert [s.input for s in shapes] == [(3, 32, 32), (8, 32, 32), (16, 16, 16), (32, 16, 16)]
    assert [s.output for s in shapes] == [(8, 32, 32), (16, 16, 16), (32, 16, 16), (64, 16, 16)]
    assert shapes[0].parameters == 3 * 3 * 3 * 8 + 2 * 8
    assert shapes[0].head_parameters == 7 * 8 * 4 * 4 + 1


@pytest.mark.parametrize(
    ("objective", "count"),
    [("{name: hff}", 4), ("{name: ce}", 4), ("{name: hff, block_size: 3}", 2), ("{name: bp}", 1)],
)
def test_the_number_of_units_is_that_of_the_shapes(load: Any, objective: str, count: int) -> None:
    job = load(f"objective={objective}")
    assert units(job) == len(layer_shapes(job, 10)) == count


def test_prototypes_and_classes_reach_the_head(load: Any) -> None:
    head = head_shape(load("objective.prototypes_per_class=3"), 5)
    assert (head.kind, head.num_classes, head.prototypes_per_class) == ("prototype", 5, 3)
    linear = head_shape(load("objective={name: bp}"), 5)
    assert (linear.kind, linear.num_classes, linear.prototypes_per_class) == ("linear", 5, 1)
    assert head_shape(load(), None).num_classes == 10


def test_classes_and_images_are_known_from_the_job_or_not_at_all(load: Any) -> None:
    assert (known_classes(load()), known_train_samples(load())) == (None, None)
    stated = load("data.expect={train_samples: 1000, classes: 7}")
    assert (known_classes(stated), known_train_samples(stated)) == (7, 1000)
    held_out = load("data.expect={train_samples: 1000, classes: 7}", "data.val={from_train: 0.1}")
    assert known_train_samples(held_out) == 900
    digits = load("data=digits")
    assert known_classes(digits) == 10
    assert known_train_samples(digits) == pytest.approx(1347, abs=10)


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        ("{name: hff, similarity: 1, coarse: [2]}", "S0"),
        ("{name: ce, aux_convs: 1}", "S1"),
        ("{name: hff, block_size: 2, aux_convs: 1}", "B"),
        ("{name: bp}", "BP"),
    ],
)
def test_the_locality_of_a_job_is_that_of_what_its_gradients_pass(load: Any, objective: str, expected: str) -> None:
    assert locality(load(f"objective={objective}")) == expected


def test_hidden_convolutions_are_counted_with_the_heads(load: Any) -> None:
    plain, deep = layer_shapes(load(), 7), layer_shapes(load("objective.aux_convs=2"), 7)
    # On 8 x 8 cells, twice the grid of 4 x 4; the batch norms' parameters and buffers too.
    assert deep[0].head_parameters - plain[0].head_parameters == 2 * (9 * 8 * 8 + 2 * 8)
    assert deep[0].buffers - plain[0].buffers == 2 * (2 * 8 + 1)
    assert deep[0].head_flops - plain[0].head_flops == 2 * 2 * 9 * 8 * 8 * 64
    assert (deep[0].parameters, deep[0].forward_flops) == (plain[0].parameters, plain[0].forward_flops)
