"""Bodies that never learn, and what heads see of maps and tokens."""

from __future__ import annotations

import torch
from torch import nn

from hff import Frozen, HeadOptions, LocalLayer, local_forward_backward, local_update, make_optimizer
from hff.architectures import make_head
from hff.objectives import pool_to_grid


def layer() -> LocalLayer:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
    return LocalLayer("unit", Frozen(body), make_head(HeadOptions(num_classes=3), 4 * 4, 2))


def test_a_frozen_body_stays_in_evaluation_mode_whatever_surrounds_it() -> None:
    unit = layer().train()
    assert unit.training
    assert not any(module.training for module in unit.body.modules())
    x = torch.randn(5, 3, 8, 8)
    assert torch.equal(unit(x), unit(x)), "no dropout, no statistics of the batch"


def test_only_the_head_learns_and_has_an_optimizer() -> None:
    unit = layer().train()
    before = {k: v.clone() for k, v in unit.state_dict().items()}
    optimizer = make_optimizer(unit, "adamw", lr=0.1, weight_decay=0.5)
    x, target = torch.randn(6, 3, 8, 8, requires_grad=True), torch.tensor([0, 1, 2, 0, 1, 2])
    update = local_forward_backward(unit, x, target, count=6)
    local_update(unit, optimizer)
    assert x.grad is None
    assert not update.output.requires_grad
    changed = {k for k, v in unit.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"head.prototypes", "head.raw_scale"}
    assert len([p for group in optimizer.param_groups for p in group["params"]]) == 2


def test_frozen_numbers_are_part_of_what_is_saved() -> None:
    assert {"body.module.0.weight", "body.module.1.running_mean"} <= set(layer().state_dict())


def test_tokens_are_pooled_like_the_map_that_they_are() -> None:
    grid = torch.randn(2, 7, 4, 4)
    tokens = torch.cat([torch.full((2, 2, 7), 99.0), grid.flatten(2).transpose(1, 2)], dim=1)
    assert torch.equal(pool_to_grid(tokens, 2, prefix_tokens=2), pool_to_grid(grid, 2))
    assert torch.equal(pool_to_grid(tokens, 9, prefix_tokens=2), grid.flatten(1))
