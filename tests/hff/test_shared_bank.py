"""The experiment of one bank for all layers: its heads are what they are said to be, and stay local."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from benchmarks.shared_bank import ROWS, AdaptedHead, Sharing, head_parameters, share
from hff import (
    GreedyNetwork,
    HeadOptions,
    LocalLayer,
    VggOptions,
    audit_locality,
    build_layers,
    make_optimizer,
    normalise,
    prototype_scores,
)

CLASSES, GRID = 5, 2
IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
TARGETS = torch.arange(8) % CLASSES


def layers_with(sharing: Sharing) -> list[LocalLayer]:
    options = VggOptions(widths=(4, 6, 6, 8), pool_after=(0,), head_grid=GRID)
    layers = build_layers(options, (3, 8, 8), HeadOptions(num_classes=CLASSES), seed=0)
    share(layers, sharing, seed=0)
    return layers


def heads(layers: list[LocalLayer]) -> list[AdaptedHead]:
    return [layer.head for layer in layers if isinstance(layer.head, AdaptedHead)]


@pytest.mark.parametrize("row", [row for row in ROWS if ROWS[row] is not None])
def test_no_loss_reaches_the_bank_but_its_owners(row: str) -> None:
    sharing = ROWS[row]
    assert sharing is not None
    layers = layers_with(sharing)
    report = audit_locality(GreedyNetwork(layers), IMAGES, TARGETS)
    own = [sum(p.numel() for p in layer.parameters() if p.requires_grad) for layer in layers]
    assert list(report.reached) == own
    banks = [head.prototypes.requires_grad for head in heads(layers)]
    expected = {"each": [True] * 4, "nobody": [False] * 4}
    assert banks == expected.get(str(sharing.trained_by), [i == sharing.trained_by for i in range(4)])


def test_a_borrower_scores_its_convolved_map_against_the_owners_prototypes() -> None:
    layers = layers_with(Sharing(0))
    owner, borrower = heads(layers)[:2]
    y = torch.randn(8, 6, 4, 4, generator=torch.Generator().manual_seed(1))
    kernel = borrower.adapter.get_parameter("mix.weight")[:, :, None, None]
    space = F.conv2d(F.avg_pool2d(y, 2), kernel).flatten(1)
    proto = F.normalize(owner.prototypes, dim=-1)
    expected = borrower.scale * prototype_scores(normalise(space), proto, borrower.sharpness)
    torch.testing.assert_close(borrower.eval()(y), expected)


def test_the_bank_that_is_sent_is_that_from_before_the_steps_update() -> None:
    layers = layers_with(Sharing(0, channels=3))
    owner, *others = heads(layers)
    optimizers = [make_optimizer(layer, "adamw", lr=0.1) for layer in layers]
    network = GreedyNetwork(layers)
    for _ in range(2):
        before = owner.unit_prototypes().detach().clone()
        network.train_step(IMAGES, TARGETS, optimizers)
        assert not torch.equal(owner.unit_prototypes(), before)
        assert all(torch.equal(head.unit_prototypes(), before) for head in others)
    network.eval()
    assert all(torch.equal(head.unit_prototypes(), owner.unit_prototypes()) for head in others)


def test_a_bank_counts_once_among_the_parameters() -> None:
    adapters = 4 * 3 + 6 * 3 + 6 * 3 + 8 * 3
    bank, scales = CLASSES * 3 * GRID**2, 4
    assert head_parameters(layers_with(Sharing(0, channels=3))) == adapters + bank + scales
    assert head_parameters(layers_with(Sharing("each", channels=3))) == adapters + 4 * bank + scales
    assert head_parameters(layers_with(Sharing("nobody", channels=3))) == adapters + scales
