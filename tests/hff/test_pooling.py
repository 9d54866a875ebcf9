"""The gradient of a head's pooling against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from hff.objectives import pool_to_grid


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("height", "width", "grid"), [(16, 16, 4), (12, 6, 3), (6, 4, 4), (7, 9, 4), (3, 3, 4)])
def test_values_and_gradients_are_those_of_adaptive_pooling(
    height: int, width: int, grid: int, memory_format: torch.memory_format
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, height, width, generator=generator, dtype=torch.float64)
    x = x.contiguous(memory_format=memory_format)
    ours, theirs = x.clone().requires_grad_(True), x.clone().requires_grad_(True)
    found = pool_to_grid(ours, grid)
    expected = F.adaptive_avg_pool2d(theirs, (min(grid, height), min(grid, width))).flatten(1)
    weights = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    assert torch.equal(found, expected)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-14, atol=1e-16)
    assert ours.grad is not None
    assert ours.grad.is_contiguous(memory_format=memory_format)
