"""Units fed with cached features against the same units fed with images."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

from hff.architectures import HeadOptions, make_head
from hff.audit import audit_locality
from hff.layers import Frozen, LocalLayer, Pooled, conv_body, linear_body
from hff.local import make_optimizer
from hff.network import GreedyNetwork
from hff.randomness import seeded
from orchestrator.run.checkpoint import layer_sha256
from orchestrator.transfer.cached import divided, fed, trunk_parts, trunk_sha256, trunk_units

CLASSES = 3
HEAD = HeadOptions(num_classes=CLASSES, prototypes_per_class=2)


def conv(fan_in: int, width: int) -> Frozen:
    return Frozen(conv_body(fan_in, width, kernel=3, stride=1, norm="batch", pool=True))


def unit(name: str, features: int, **parts: nn.Module) -> LocalLayer:
    return LocalLayer(name, nn.Sequential(OrderedDict(parts)), make_head(HEAD, features, 2))


def network(tops: str) -> list[LocalLayer]:
    """A frozen trunk of three stages, maps 8, 4, 2 wide: heads at the first and, but for `behind`, the last."""
    with seeded(5):
        lower = [unit("stage0", 4 * 4, stage0=conv(3, 4))]
        upper: dict[str, nn.Module] = {"stage1": conv(4, 6), "stage2": conv(6, 5)}
        pooled: dict[str, nn.Module] = {"pooled": Pooled(2)}
        first = {"top0": linear_body(5 * 4, 7, norm="batch", dropout=0.0)}
        if tops == "behind":
            return [*lower, unit("stage1..top0", 7, **upper, **pooled, **first)]
        lower.append(unit("stage1..stage2", 5 * 4, **upper))
        if tops == "none":
            return lower
        second = unit("top1", 6, top1=linear_body(7, 6, norm="batch", dropout=0.0))
        return [*lower, unit("top0", 7, **pooled, **first), second]


def images(count: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 16, 16, generator=random), torch.randint(0, CLASSES, (count,), generator=random)


CASES = {"none": [16, 20], "on top": [16, 20], "behind": [16, 20]}


@pytest.mark.parametrize("tops", CASES)
def test_fed_units_give_the_logits_of_images_and_learn_the_same_weights(tops: str) -> None:
    whole = network(tops)
    units = trunk_units(whole)
    x, _ = images()
    parts = trunk_parts(units, x)
    assert [part.shape[1] for part in parts] == CASES[tops]
    from_images = GreedyNetwork(copy.deepcopy(whole), vote="equal")
    from_features = GreedyNetwork(fed(copy.deepcopy(whole), 0, CASES[tops]), vote="equal")
    optimizers = [
        [make_optimizer(layer, "adamw", lr=1e-2) for layer in net.layers] for net in (from_images, from_features)
    ]
    for step in range(4):
        x, target = images(seed=step)
        from_images.train_step(x, target, optimizers[0])
        from_features.train_step(torch.cat(trunk_parts(units, x), dim=1), target, optimizers[1])
    x, _ = images(seed=9)
    from_images.eval()
    from_features.eval()
    assert torch.equal(from_images(x), from_features(torch.cat(trunk_parts(units, x), dim=1)))
    for a, b in zip(from_images.layers, from_features.layers, strict=True):
        assert layer_sha256(a) == layer_sha256(b), "the files of a layer do not tell how it was fed"
    assert trunk_sha256(trunk_units(list(from_images.layers))) == trunk_sha256(units), "the trunk has not moved"


@pytest.mark.parametrize("tops", CASES)
def test_a_stage_of_a_pipeline_is_handed_what_the_units_before_it_left(tops: str) -> None:
    whole = network(tops)
    x, _ = images()
    features = torch.cat(trunk_parts(trunk_units(whole), x), dim=1)
    together = GreedyNetwork(fed(whole, 0, CASES[tops])).eval()
    expected = together.layer_logits(features)
    for border in range(1, len(whole)):
        handed_on = features
        for layer in fed(whole[:border], 0, CASES[tops]):
            handed_on = layer(handed_on)
        behind = GreedyNetwork(fed(whole[border:], border, CASES[tops])).eval()
        for got, wanted in zip(behind.layer_logits(handed_on), expected[border:], strict=True):
            assert torch.equal(got, wanted)


def test_a_fed_network_is_local_too() -> None:
    whole = network("on top")
    x, target = images()
    features = torch.cat(trunk_parts(trunk_units(whole), x), dim=1)
    report = audit_locality(GreedyNetwork(fed(whole, 0, [16, 20])), features, target)
    assert report.layers == 4
    assert report.reached[0] == 2 * CLASSES * 16 + 1, "the prototypes and the scale of its head"


def test_the_hash_of_a_trunk_changes_with_every_bit_and_not_with_the_heads() -> None:
    whole = network("none")
    before = trunk_sha256(trunk_units(whole))
    whole[0].head.prototypes.data[0, 0, 0] += 1
    assert trunk_sha256(trunk_units(whole)) == before
    stage = divided(whole[1])[0][1]
    weight = next(stage.parameters()).data.view(-1)
    bits = weight.view(torch.int32)
    bits[3] ^= 1
    assert trunk_sha256(trunk_units(whole)) != before


def test_the_frozen_stages_of_a_body_are_those_before_anything_that_learns() -> None:
    stages, rest = divided(network("behind")[1])
    assert (len(stages), len(rest)) == (2, 2)
    assert divided(LocalLayer("plain", linear_body(4, 4, norm="none", dropout=0.0), make_head(HEAD, 4, 1)))[0] == ()
    only_learning = unit("top", 4, top0=linear_body(4, 4, norm="none", dropout=0.0), late=Frozen(nn.Identity()))
    assert trunk_units([only_learning]) == []
