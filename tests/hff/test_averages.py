"""The running average of a layer's weights, against the sum that defines it."""

from __future__ import annotations

import pytest
import torch

from hff import Frozen, HeadOptions, LocalLayer, VggOptions, build_layers
from hff.architectures import make_head
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


def test_many_tensors_at_once_are_averaged_to_the_bits_of_one_after_the_other() -> None:
    layer = a_layer().to(memory_format=torch.channels_last)
    average, one_by_one = WeightAverage(layer, 0.3), WeightAverage(layer, 0.3).weights
    for step in range(6):
        with torch.no_grad():
            for value in layer.state_dict().values():
                value.add_(torch.randn_like(value) if value.is_floating_point() else 1)
        average.update(step)
        for name, value in layer.state_dict().items():
            if value.is_floating_point():
                one_by_one[name].lerp_(value, 1 - min(0.3, (1 + step) / (10 + step)))
            else:
                one_by_one[name].copy_(value)
    for name, value in one_by_one.items():
        assert torch.equal(average.weights[name], value), name


class Centred(torch.nn.Module):
    """Keeps a running mean by putting a new tensor in the place of its buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(192))
        self.linear = torch.nn.Linear(192, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        if self.training:
            self.centre = 0.5 * self.centre + 0.5 * x.mean(0)
        y: torch.Tensor = self.linear(x - self.centre)
        return y


def test_a_buffer_that_is_replaced_in_the_forward_pass_is_averaged_all_the_same() -> None:
    layer = LocalLayer("own", Centred(), make_head(HeadOptions(num_classes=4), 6, 1))
    average = WeightAverage(layer, 0.5)
    states = taught(layer, average, 3)
    expected = torch.zeros(192)
    for decay, state in zip((1 / 10, 2 / 11, 3 / 12), states, strict=True):
        expected = decay * expected + (1 - decay) * state["body.centre"]
    torch.testing.assert_close(average.weights["body.centre"], expected)
    with average.in_place():
        assert torch.equal(layer.state_dict()["body.centre"], average.weights["body.centre"])
    assert torch.equal(layer.state_dict()["body.centre"], states[-1]["body.centre"])
