"""A batch in parts gives the gradients of the whole and keeps the activations of one part."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from benchmarks.memory import Held
from hff import HeadOptions, LocalLayer, VggOptions, build_layers
from hff.local import local_forward_backward


def a_layer(norm: str) -> LocalLayer:
    (layer,) = build_layers(VggOptions(widths=(8,), norm=norm), (3, 8, 8), HeadOptions(num_classes=3), seed=0)
    return layer.double()


def a_batch(samples: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, 3, 8, 8, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (samples,), generator=generator)


def gradients(layer: LocalLayer) -> list[Tensor]:
    return [p.grad for p in layer.parameters() if p.grad is not None]


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_the_sum_over_the_parts_is_the_gradient_of_the_whole(parts: int) -> None:
    x, target = a_batch(8)
    whole, divided = a_layer("none"), a_layer("none")
    expected = local_forward_backward(whole, x, target, count=8)
    found = local_forward_backward(divided, x, target, count=8, micro_batches=parts)
    torch.testing.assert_close(found.output, expected.output, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.loss_sum, expected.loss_sum, rtol=1e-12, atol=0)
    assert int(found.correct) == int(expected.correct)
    assert len(gradients(divided)) == len(gradients(whole)) > 0
    torch.testing.assert_close(gradients(divided), gradients(whole), rtol=1e-10, atol=1e-12)


def test_a_batch_norm_takes_the_statistics_of_each_part() -> None:
    x, target = a_batch(7)
    layer = a_layer("batch")
    alone = copy.deepcopy(layer)
    found = local_forward_backward(layer, x, target, count=7, micro_batches=2)
    expected = [
        local_forward_backward(alone, x[part], target[part], count=7).output for part in (slice(4), slice(4, 7))
    ]
    assert torch.equal(found.output, torch.cat(expected))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(gradients(layer), gradients(alone), strict=True))


def test_only_the_activations_of_one_part_are_kept() -> None:
    x, target = a_batch(32)
    layer = a_layer("none")
    held = []
    for parts in (1, 4):
        with Held([x, *layer.parameters()]) as holding:
            local_forward_backward(layer, x, target, count=32, micro_batches=parts)
        held.append(holding.peak_bytes)
    assert held[1] < 0.3 * held[0]
