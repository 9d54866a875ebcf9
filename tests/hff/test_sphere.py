"""Scores and losses against closed forms in plain Python, gradients against finite differences."""

from __future__ import annotations

import math

import pytest
import torch

from hff import (
    HeadOptions,
    LinearHead,
    LocalLayer,
    PrototypeHead,
    VggOptions,
    build_layers,
    local_forward_backward,
    margin_loss,
    normalise,
    prototype_scores,
)
from hff.layers import conv_body, linear_body
from hff.randomness import seeded
from hff.sphere import EPSILON, cosines


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_score_is_the_mean_logsumexp_of_the_cosines() -> None:
    z, proto, t = normalise(random(3, 5)), normalise(random(2, 4, 5, seed=1)), 7.0
    scores = prototype_scores(z, proto, t)
    for b in range(3):
        for c in range(2):
            cosines = [sum(float(z[b, d] * proto[c, m, d]) for d in range(5)) for m in range(4)]
            expected = math.log(sum(math.exp(t * cos) for cos in cosines) / 4) / t
            assert scores[b, c].item() == pytest.approx(expected, abs=1e-12)
            assert -1 <= scores[b, c] <= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_features_of_half_precision_are_brought_to_length_one_in_float32(dtype: torch.dtype) -> None:
    feature = random(3, 50).to(dtype)
    z = normalise(feature)
    assert z.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = feature.double() / feature.double().square().sum(dim=1, keepdim=True).sqrt()
    torch.testing.assert_close(z.double(), exact, rtol=1e-6, atol=0)


def test_more_copies_of_the_same_prototype_do_not_change_a_score() -> None:
    z, proto = normalise(random(3, 5)), normalise(random(2, 1, 5, seed=1))
    once = prototype_scores(z, proto, 10.0)
    torch.testing.assert_close(prototype_scores(z, proto.repeat(1, 6, 1), 10.0), once)


def test_cosines_and_their_gradients_are_those_of_normalised_prototypes() -> None:
    z = normalise(random(3, 5)).requires_grad_()
    proto = 3 * random(2, 4, 5, seed=1)
    proto[0, 1] *= 0.1 * EPSILON  # shorter than what counts as a length
    proto.requires_grad_()
    weight = random(3, 2, 4, seed=2)
    expected = (z @ torch.nn.functional.normalize(proto, dim=-1, eps=EPSILON).flatten(0, 1).T).view(3, 2, 4)
    ours = cosines(z, proto)
    torch.testing.assert_close(ours, expected)
    gradients = torch.autograd.grad((weight * ours).sum(), [z, proto])
    torch.testing.assert_close(gradients, torch.autograd.grad((weight * expected).sum(), [z, proto]))
    with torch.no_grad():
        assert torch.equal(cosines(z, proto), ours)


def test_margin_loss_is_the_softplus_of_the_published_form() -> None:
    scores, target, a, margin = torch.tanh(random(4, 3)), torch.tensor([0, 2, 1, 1]), 9.0, 0.2
    losses = margin_loss(a * scores, target, torch.tensor(a), margin)
    for b in range(4):
        y = int(target[b])
        others = [math.exp(a * (float(scores[b, j]) + margin)) for j in range(3) if j != y]
        expected = math.log1p(math.exp(math.log(sum(others)) - a * float(scores[b, y])))
        assert losses[b].item() == pytest.approx(expected, abs=1e-12)


def test_a_row_of_zeros_has_finite_gradients() -> None:
    feature = random(3, 4)
    feature[1] = 0
    feature.requires_grad_()
    head = PrototypeHead(4, 3, grid=1).double()
    head.loss(head(feature), torch.tensor([0, 1, 2])).sum().backward()
    assert feature.grad is not None
    assert torch.isfinite(feature.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in head.parameters() if p.grad is not None)


def test_the_scale_stays_inside_its_bounds_however_far_it_is_pushed() -> None:
    head = PrototypeHead(4, 3, grid=1, scale=20.0, scale_min=16.0, scale_max=64.0)
    assert head.scale.item() == pytest.approx(20.0, rel=1e-5)
    for pushed in (-1e3, 1e3):
        with torch.no_grad():
            head.raw_scale.fill_(pushed)
        assert 16.0 <= head.scale.item() <= 64.0


def test_prototypes_are_unit_vectors_after_every_update() -> None:
    head = PrototypeHead(6, 3, grid=1, prototypes_per_class=2)
    with torch.no_grad():
        head.prototypes.mul_(3.7)
    head.constrain_()
    torch.testing.assert_close(head.prototypes.norm(dim=-1), torch.ones(3, 2))


def _layers() -> dict[str, tuple[LocalLayer, torch.Tensor]]:
    with seeded(3):
        conv = conv_body(2, 4, kernel=3, stride=1, norm="batch", pool=False)
        linear = linear_body(8, 6, norm="layer", dropout=0.0)
        return {
            "hff-conv": (
                LocalLayer("c", conv, PrototypeHead(16, 3, grid=2, prototypes_per_class=2, margin=0.1)),
                random(4, 2, 4, 4),
            ),
            "hff-pooled": (
                LocalLayer(
                    "c", conv_body(2, 4, kernel=3, stride=1, norm="batch", pool=True), PrototypeHead(16, 3, grid=2)
                ),
                random(4, 2, 5, 5),
            ),
            "ce-conv": (LocalLayer("c", conv, LinearHead(16, 3, grid=2)), random(4, 2, 4, 4)),
            "hff-linear": (LocalLayer("l", linear, PrototypeHead(6, 3, grid=1)), random(4, 8)),
            "ce-linear": (LocalLayer("l", linear, LinearHead(6, 3, grid=1, label_smoothing=0.1)), random(4, 8)),
        }


@pytest.mark.parametrize("kind", ["hff-conv", "hff-pooled", "ce-conv", "hff-linear", "ce-linear"])
def test_the_gradient_of_a_local_loss_agrees_with_finite_differences(kind: str) -> None:
    layer, x = _layers()[kind]
    layer.double()
    target = torch.tensor([0, 1, 2, 1])

    def loss() -> torch.Tensor:
        y = layer(x)
        # One sample whose features are all dead: the sphere must not divide by zero.
        y = y * torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=y.dtype).view(-1, *[1] * (y.dim() - 1))
        return layer.head.loss(layer.head(y), target).sum()

    loss().backward()
    checked = 0
    for parameter in layer.parameters():
        if not parameter.requires_grad:
            continue
        assert parameter.grad is not None
        flat, gradient = parameter.data.view(-1), parameter.grad.view(-1)
        for i in range(0, flat.numel(), max(1, flat.numel() // 7)):
            before, differences = flat[i].item(), []
            for step in (1e-6, 5e-7):
                flat[i] = before + step
                up = loss().item()
                flat[i] = before - step
                down = loss().item()
                flat[i] = before
                differences.append((up - down) / (2 * step))
            if abs(differences[0] - differences[1]) > 1e-4 * max(1.0, abs(differences[0])):
                continue  # a kink of ReLU or max-pooling lies between the two points
            assert gradient[i].item() == pytest.approx(differences[1], rel=1e-4, abs=1e-6)
            checked += 1
    assert checked > 12


@pytest.mark.parametrize("kind", ["prototype", "linear"])
@pytest.mark.parametrize("aux_convs", [0, 1])
def test_under_autocast_the_body_hands_on_its_dtype_and_the_head_judges_in_float32(kind: str, aux_convs: int) -> None:
    options, head = VggOptions(widths=(8,), norm="group"), HeadOptions(kind, num_classes=3, aux_convs=aux_convs)
    (layer,) = build_layers(options, (3, 8, 8), head, seed=0)
    x = random(4, 3, 8, 8).float()
    update = local_forward_backward(layer, x, torch.tensor([0, 1, 2, 1]), count=4, autocast_dtype=torch.bfloat16)
    assert update.output.dtype == torch.bfloat16
    layer.eval()
    expected = layer.logits(update.output)
    assert expected.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.logits(update.output), expected)
