"""Mixed samples: the loss of two labels with weights is that of soft labels."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from hff import HeadOptions, LocalLayer, VggOptions, build_layers
from hff.local import local_forward_backward

X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
OWN, PARTNER = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3]), torch.tensor([3, 1, 0, 2, 2, 0, 1, 1])


def a_layer(kind: str, **options: float) -> LocalLayer:
    head = HeadOptions(kind, num_classes=4, **options)  # type: ignore[arg-type]
    (layer,) = build_layers(VggOptions(widths=(8,), norm="none"), (3, 8, 8), head, seed=0)
    return layer.double()


def gradients(layer: LocalLayer) -> list[torch.Tensor]:
    return [p.grad for p in layer.parameters() if p.grad is not None]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("linear", {"label_smoothing": 0.1}),
        ("prototype", {"margin": 0.0}),
        ("prototype", {"margin": 0.0, "label_smoothing": 0.1}),
    ],
)
@pytest.mark.parametrize("weight", [0.0, 0.3, 0.8])
def test_two_labels_are_soft_labels_of_cross_entropy(kind: str, options: dict[str, float], weight: float) -> None:
    layer, other = a_layer(kind, **options), a_layer(kind, **options)
    found = local_forward_backward(layer, X, OWN, count=8, partner=PARTNER, partner_weight=weight)
    soft = (1 - weight) * F.one_hot(OWN, 4).double() + weight * F.one_hot(PARTNER, 4).double()
    smoothing = options.get("label_smoothing", 0.0)
    logits = other.logits(other(X))
    expected = F.cross_entropy(logits, soft, reduction="sum", label_smoothing=smoothing)
    (expected / 8).backward()
    torch.testing.assert_close(found.loss_sum, expected.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients(layer), gradients(other), rtol=1e-10, atol=1e-14)
    heavier = PARTNER if weight > 0.5 else OWN
    assert int(found.correct) == int((logits.argmax(dim=1) == heavier).sum())


def test_a_margin_is_taken_from_each_of_the_two_labels() -> None:
    layer, other = a_layer("prototype", margin=0.2), a_layer("prototype", margin=0.2)
    found = local_forward_backward(layer, X, OWN, count=8, partner=PARTNER, partner_weight=0.25)
    parts = [local_forward_backward(other, X, label, count=8).loss_sum for label in (OWN, PARTNER)]
    torch.testing.assert_close(found.loss_sum, 0.75 * parts[0] + 0.25 * parts[1], rtol=1e-12, atol=0)


def test_parts_of_a_batch_have_their_own_partners() -> None:
    whole, divided = a_layer("linear"), a_layer("linear")
    expected = local_forward_backward(whole, X, OWN, count=8, partner=PARTNER, partner_weight=0.4)
    found = local_forward_backward(divided, X, OWN, count=8, partner=PARTNER, partner_weight=0.4, micro_batches=3)
    torch.testing.assert_close(found.loss_sum, expected.loss_sum, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients(divided), gradients(whole), rtol=1e-10, atol=1e-14)
