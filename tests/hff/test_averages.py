"""The running average of a layer's weights, against the sum that defines it."""

from __future__ import annotations

import pytest
import torch

from hff import Frozen, HeadOptions, LocalLayer, VggOptions, build_layers
from hff.averages import WeightAverage
from hff.local import local_forward_backward, local_update, make_optimizer


def a_layer() -> LocalLayer:
    (layer,) = build_layers(VggOptions(widths=(6,)), (3, 8, 8), HeadOptions(num_classes=4), seed=0)
    return layer


def taught(layer: LocalLayer, average: WeightAverage, steps: int) -> list[dict[str, torch.Tensor]]:
    """The layer's state after each of some updates, each of which the average was told of."""
    optimizer = make_optimizer(layer, "adamw", lr=0.1)
    generator = torch.Generator().manual_seed(1)
    states = []
    for step in range(steps):
        x = torch.randn(10, 3, 8, 8, generator=generator)
        local_forward_backward(layer, x, torch.arange(10) % 4, count=10)
        local_update(layer, optimizer)
        average.update(step)
        states.append({name: tensor.clone() for name, tensor in layer.state_dict().items()})
    return states


def test_the_average_is_the_weighted_sum_of_all_weights_so_far() -> None:
    layer = a_layer()
    first = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    average = WeightAverage(layer, 0.3)
    states = taught(layer, average, 6)
    decays = [1 / 10, 2 / 11, 3 / 12, 0.3, 0.3, 0.3]
    for name, value in average.weights.items():
        if not value.is_floating_point():
            assert torch.equal(value, states[-1][name]), "counters are not averaged"
            continue
        expected = first[name].double()
        for decay, state in zip(decays, states, strict=True):
            expected = decay * expected + (1 - decay) * state[name].double()
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    assert {"body.0.weight", "body.1.running_var", "head.prototypes", "head.raw_scale"} <= average.weights.keys()


def test_a_layer_has_the_average_within_the_block_and_its_own_bits_behind_it() -> None:
    layer = a_layer()
    average = WeightAverage(layer, 0.9)
    own = taught(layer, average, 5)[-1]
    with average.in_place():
        for name, value in average.weights.items():
            assert torch.equal(layer.state_dict()[name], value)
    assert not torch.equal(own["body.0.weight"], average.weights["body.0.weight"])
    for name, value in own.items():
        assert torch.equal(layer.state_dict()[name], value)
    with pytest.raises(RuntimeError), average.in_place():
        raise RuntimeError
    assert torch.equal(layer.state_dict()["body.0.weight"], own["body.0.weight"]), "also when the block fails"


def test_what_is_frozen_is_not_averaged() -> None:
    layer = a_layer()
    layer.body = torch.nn.Sequential(Frozen(layer.body[:2]), *layer.body[2:])
    assert set(WeightAverage(layer, 0.9).weights) == {"head.prototypes", "head.raw_scale"}
