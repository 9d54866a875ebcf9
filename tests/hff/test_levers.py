"""The similarity term and super-classes against closed forms in plain Python."""

from __future__ import annotations

import math

import pytest
import torch

from hff import (
    GreedyNetwork,
    HeadOptions,
    VggOptions,
    audit_locality,
    build_layers,
    cluster,
    contrastive_losses,
    local_forward_backward,
    normalise,
    prototype_scores,
)
from hff.architectures import make_head
from hff.similarity import SimilarityTerm
from hff.superclasses import joined_logits


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_contrastive_loss_is_the_published_formula() -> None:
    z, target, t = normalise(random(5, 3)), [0, 1, 0, 0, 2], 0.2
    losses = contrastive_losses(z, torch.tensor(target), t)
    for i in range(5):
        similar = [math.exp(float(z[i] @ z[a]) / t) for a in range(5)]
        others = sum(s for a, s in enumerate(similar) if a != i)
        same = [p for p in range(5) if p != i and target[p] == target[i]]
        expected = -sum(math.log(similar[p] / others) for p in same) / len(same) if same else 0.0
        assert losses[i].item() == pytest.approx(expected, abs=1e-12)


def test_a_sample_that_is_alone_and_a_dead_one_have_finite_gradients() -> None:
    for feature in (random(1, 3), torch.zeros(3, 3, dtype=torch.float64)):
        feature.requires_grad_()
        SimilarityTerm(1.0)(feature, torch.zeros(len(feature), dtype=torch.int64), len(feature)).backward()
        assert feature.grad is not None
        assert torch.isfinite(feature.grad).all()


@pytest.mark.parametrize("shares", [(2, 3), (5, 0), (1, 1, 3)])
def test_shares_of_a_batch_add_up_to_its_loss_and_gradient(shares: tuple[int, ...]) -> None:
    feature, target = random(5, 3), torch.tensor([0, 1, 0, 1, 0])
    whole = feature.clone().requires_grad_()
    expected = SimilarityTerm(0.7)(whole, target, 5)
    expected.backward()
    total, first = 0.0, 0
    for share in shares:
        own = feature.clone()[first : first + share].requires_grad_()
        term = SimilarityTerm(0.7)

        def gather(z: torch.Tensor, _: torch.Tensor, count: int, at: int = first) -> tuple[torch.Tensor, ...]:
            known = normalise(feature)
            return torch.cat([known[:at], z, known[at + len(z) :]]), target[:count], at

        term.gather = gather
        found = term(own, target[first : first + share], 5)
        found.backward()
        torch.testing.assert_close(own.grad, whole.grad[first : first + share])
        total, first = total + found.item(), first + share
    assert total == pytest.approx(expected.item())


def test_the_loss_of_a_step_is_that_of_the_prototypes_and_the_term() -> None:
    x, target = random(6, 3, 8, 8).float(), torch.tensor([0, 1, 2, 0, 1, 1])
    options = VggOptions(widths=(4,), norm="none")
    sums, gradients = [], []
    for weight in (0.0, 1.0, 2.0):
        (layer,) = build_layers(options, (3, 8, 8), HeadOptions(num_classes=3, similarity=weight), seed=0)
        sums.append(local_forward_backward(layer, x, target, count=6).loss_sum)
        gradients.append(layer.body[0].weight.grad)
    z = normalise(layer.head.flat(layer(x)))
    torch.testing.assert_close(sums[1] - sums[0], contrastive_losses(z, target, 0.1).sum())
    torch.testing.assert_close(gradients[2] - gradients[1], gradients[1] - gradients[0], rtol=1e-3, atol=1e-6)


def test_the_term_of_a_layer_that_learns_super_classes_is_over_these() -> None:
    x, target, groups = random(6, 3, 8, 8).float(), torch.tensor([0, 1, 2, 3, 1, 0]), (0, 0, 1, 1)
    options, sums = VggOptions(widths=(4,), norm="none"), []
    for weight in (0.0, 1.0):
        head = HeadOptions(num_classes=4, similarity=weight, groups=groups)
        (layer,) = build_layers(options, (3, 8, 8), head, seed=0)
        sums.append(local_forward_backward(layer, x, target, count=6).loss_sum)
    z = normalise(layer.head.flat(layer(x)))
    expected = contrastive_losses(z, torch.tensor(groups)[target], 0.1).sum()
    torch.testing.assert_close(sums[1] - sums[0], expected, rtol=1e-4, atol=0)


def test_layers_with_all_levers_are_strictly_local() -> None:
    head = HeadOptions(num_classes=4, similarity=0.5, aux_convs=1, groups=(0, 0, 1, 1))
    network = GreedyNetwork(build_layers(VggOptions(widths=(4, 6)), (3, 8, 8), head, seed=0))
    report = audit_locality(network, random(6, 3, 8, 8).float(), torch.tensor([0, 1, 2, 3, 1, 1]))
    assert report.reached == tuple(sum(p.numel() for p in layer.parameters()) for layer in network.layers)


def test_joined_logits_are_the_log_of_the_members_sum_however_far_apart() -> None:
    logits = torch.tensor([[1.0, 2.0, -3.0, 0.5], [-900.0, 4.0, -901.0, 900.0]], dtype=torch.float64)
    joined = joined_logits(logits, torch.tensor([0, 1, 0, 1]), 2)
    for b, row in enumerate(logits.tolist()):
        for g, members in enumerate(([0, 2], [1, 3])):
            highest = max(row[m] for m in members)
            expected = highest + math.log(sum(math.exp(row[m] - highest) for m in members))
            assert joined[b, g].item() == pytest.approx(expected, abs=1e-12)


def test_the_probability_of_a_super_class_is_that_of_its_members_with_linear_heads() -> None:
    head = make_head(HeadOptions("linear", 4, groups=(0, 1, 1, 0)), 3, 1).double()
    logits, target = head(random(5, 3)), torch.tensor([0, 1, 2, 3, 3])
    probability = torch.softmax(logits, dim=1)
    members = torch.tensor([[0, 3], [1, 2], [1, 2], [0, 3], [0, 3]])
    torch.testing.assert_close(head.loss(logits, target), -probability.gather(1, members).sum(dim=1).log())


def test_a_super_class_scores_as_one_class_with_the_prototypes_of_all_members() -> None:
    groups = (0, 1, 0, 0)
    options = HeadOptions("prototype", 4, prototypes_per_class=2, groups=groups, sharpness=5.0, learn_scale=False)
    head = make_head(options, 3, 1).double()
    feature, target = random(6, 3), torch.tensor([0, 1, 2, 3, 1, 0])
    logits = head(feature)
    joined, label = head.joined(logits, target)
    z, proto = normalise(feature), head.unit_prototypes()
    for g, members in enumerate(([0, 2, 3], [1])):
        as_one = prototype_scores(z, proto[members].flatten(0, 1)[None], 5.0)[:, 0]
        torch.testing.assert_close(joined[:, g], 32.0 * as_one)
    assert label.tolist() == [0, 1, 0, 0, 1, 0]
    assert torch.equal(head.correct(logits, target), joined.argmax(dim=1) == label)


def test_super_classes_of_one_member_each_are_the_classes() -> None:
    feature, target = random(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    losses = []
    for groups in (None, (0, 1, 2)):
        torch.manual_seed(0)
        head = make_head(HeadOptions("prototype", 3, margin=0.1, groups=groups), 3, 1).double()
        losses.append(head.loss(head(feature), target))
    torch.testing.assert_close(losses[0], losses[1])


def test_what_is_saved_of_a_layer_knows_nothing_of_super_classes() -> None:
    plain, coarse = (make_head(HeadOptions(num_classes=3, groups=g), 3, 1) for g in (None, (0, 1, 0)))
    assert plain.state_dict().keys() == coarse.state_dict().keys()


def test_clusters_are_those_of_the_means_and_nested() -> None:
    means = torch.tensor([[0.0, 0.0], [9.0, 9.0], [0.1, 0.0], [9.0, 9.2], [9.0, 0.0], [0.0, 0.5]])
    four, three, two = cluster(means, [4, 3, 2])
    assert three == [0, 1, 0, 1, 2, 0]
    assert four == [0, 1, 0, 1, 2, 3]
    assert max(two) == 1
    for fine, coarse in ((four, three), (three, two)):
        assert len(set(zip(fine, coarse, strict=True))) == len(set(fine)), "each lies within one"
    for wrong in (1, 7):
        with pytest.raises(ValueError, match=f"from 2 to the 6 classes, got {wrong}"):
            cluster(means, [wrong])
