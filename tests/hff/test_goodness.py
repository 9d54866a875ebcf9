"""The original Forward-Forward against plain loops: labels, goodness, its gradient, and one pass per class."""

from __future__ import annotations

import math

import pytest
import torch

from hff import (
    GreedyNetwork,
    HeadOptions,
    MlpOptions,
    VggOptions,
    audit_locality,
    build_layers,
    local_forward_backward,
    make_optimizer,
    write_labels,
)
from hff.goodness import GoodnessHead, GoodnessLayer

CLASSES = 3
HEAD = HeadOptions("goodness", CLASSES, threshold=1.5, sharpness=2.0)


def images(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 1, 3, 3, generator=torch.Generator().manual_seed(0)).double()


def network(depth: int = 2) -> GreedyNetwork:
    options = MlpOptions(widths=(6, 5, 4)[:depth], norm="none")
    return GreedyNetwork(build_layers(options, (1, 3, 3), HEAD, seed=0), vote="equal").double()


def by_hand(net: GreedyNetwork, image: torch.Tensor, label: int) -> list[float]:
    """Goodness of each layer for one image that claims to be of class `label`, number by number."""
    numbers = [float(v) for v in image.flatten()]
    brightest = max(numbers)
    numbers[:CLASSES] = [brightest if c == label else 0.0 for c in range(CLASSES)]
    found = []
    for layer in net.layers:
        linear = layer.body[1]
        length = math.sqrt(sum(v * v for v in numbers) / len(numbers) + 1e-8)
        seen = [v / length for v in numbers]
        sums = [
            bias + sum(w * v for w, v in zip(row, seen, strict=True))
            for row, bias in zip(linear.weight.tolist(), linear.bias.tolist(), strict=True)
        ]
        numbers = [max(0.0, v) for v in sums]
        found.append(sum(v * v for v in numbers) / len(numbers))
    return found


def test_a_label_stands_in_the_first_numbers_and_nothing_else_changes() -> None:
    x = images(2)
    written = write_labels(x, torch.tensor([[0, 2], [1, 1]]), CLASSES)
    assert written.shape == (2, 2, 1, 3, 3)
    first = written[0, 1].flatten()
    assert first[:CLASSES].tolist() == [0, 0, float(x[0].max())]
    assert torch.equal(first[CLASSES:], x[0].flatten()[CLASSES:])
    assert torch.equal(written[1, 0], written[1, 1])


def test_more_classes_than_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="10 labels do not fit into images of 9 numbers"):
        write_labels(images(), torch.zeros(4, 1, dtype=torch.int64), 10)
    with pytest.raises(ValueError, match="10 labels do not fit into images of 9 numbers"):
        build_layers(MlpOptions(widths=(4,), norm="none"), (1, 3, 3), HeadOptions("goodness", 10), seed=0)


def test_all_classes_in_one_batch_are_one_pass_for_each_class() -> None:
    net, x = network(3), images()
    for k, goodness in enumerate(net.layer_logits(x)):
        for b in range(len(x)):
            expected = [by_hand(net, x[b], c)[k] for c in range(CLASSES)]
            assert goodness[b].tolist() == pytest.approx(expected, rel=1e-5)


def test_the_class_is_that_of_the_most_goodness_over_the_voting_layers() -> None:
    net, x = network(3), images(16)
    sums = [[sum(by_hand(net, image, c)) for c in range(CLASSES)] for image in x]
    assert net(x).argmax(dim=1).tolist() == [max(range(CLASSES), key=one.__getitem__) for one in sums]


def test_the_loss_is_that_of_two_logistic_decisions_against_the_threshold() -> None:
    head = GoodnessHead(CLASSES, threshold=1.5, sharpness=2.0)
    loss = head.loss(torch.tensor([[2.0, 1.0], [0.0, 9.0]]), torch.tensor([0, 0]))

    def minus_log_sigmoid(v: float) -> float:
        return math.log(1 + math.exp(-v))

    expected = [2 * minus_log_sigmoid(2 * 0.5), minus_log_sigmoid(2 * -1.5) + minus_log_sigmoid(2 * -7.5)]
    assert loss.tolist() == pytest.approx(expected)
    assert head.correct(torch.tensor([[2.0, 1.0], [0.0, 9.0]]), torch.tensor([0, 0])).tolist() == [True, False]


def test_the_gradient_of_a_step_is_that_of_finite_differences() -> None:
    (layer,) = network(1).layers
    assert isinstance(layer, GoodnessLayer)
    x, target = images(), torch.tensor([0, 1, 2, 0])
    pairs = write_labels(x, torch.stack([target, (target + 1) % CLASSES], dim=1), CLASSES)
    local_forward_backward(layer, pairs, target, count=4)
    weight = layer.body[1].weight
    gradient = weight.grad.clone()

    def loss() -> float:
        with torch.no_grad():
            return float(layer.head.loss(layer.logits(layer(pairs)), target).sum()) / 4

    for row, column in ((0, 0), (3, 5), (5, 8)):
        with torch.no_grad():
            weight[row, column] += 1e-6
            above = loss()
            weight[row, column] -= 2e-6
            below = loss()
            weight[row, column] += 1e-6
        assert float(gradient[row, column]) == pytest.approx((above - below) / 2e-6, abs=1e-6)


def test_how_good_a_layer_found_an_image_is_hidden_from_the_next() -> None:
    second = network().layers[1]
    y = torch.rand(4, 2, 6, dtype=torch.float64)
    assert torch.allclose(second(y), second(7.0 * y), atol=1e-6)


def test_a_layer_begins_with_a_goodness_of_about_the_threshold() -> None:
    options = MlpOptions(widths=(400, 300), norm="none")
    net = GreedyNetwork(build_layers(options, (1, 10, 10), HEAD, seed=0), vote="equal")
    for goodness in net.layer_logits(torch.randn(50, 1, 10, 10, generator=torch.Generator().manual_seed(0))):
        assert float(goodness.detach().mean()) == pytest.approx(HEAD.threshold, rel=0.2)


def test_versions_without_any_activity_stay_finite() -> None:
    second = network().layers[1]
    y = torch.zeros(4, 2, 6, dtype=torch.float64, requires_grad=True)
    second(y).sum().backward()
    assert torch.isfinite(second(y)).all()
    assert torch.isfinite(y.grad).all()


def test_every_layer_is_strictly_local() -> None:
    target = torch.tensor([0, 1, 2, 0])
    pairs = write_labels(images(), torch.stack([target, (target + 1) % CLASSES], dim=1), CLASSES)
    report = audit_locality(network(3), pairs, target)
    assert report.reached == (6 * 10, 5 * 7, 4 * 6)


def test_convolutions_take_versions_too() -> None:
    options = VggOptions(widths=(4, 6), pool_after=(0,), norm="none")
    net = GreedyNetwork(build_layers(options, (1, 4, 4), HEAD, seed=0))
    assert net(torch.rand(5, 1, 4, 4)).shape == (5, CLASSES)


def test_steps_tell_right_labels_from_wrong_ones() -> None:
    generator = torch.Generator().manual_seed(1)
    target = torch.arange(60) % CLASSES
    x = torch.rand(60, 1, 4, 4, generator=generator)
    x[torch.arange(60), 0, 2, target] += 3
    options = MlpOptions(widths=(32, 32), norm="none")
    net = GreedyNetwork(build_layers(options, (1, 4, 4), HEAD, seed=0))
    optimizers = [make_optimizer(layer, "adamw", lr=1e-2) for layer in net.layers]
    for step in range(60):
        wrong = (target + 1 + step % 2) % CLASSES
        net.train_step(write_labels(x, torch.stack([target, wrong], dim=1), CLASSES), target, optimizers)
    assert float((net.eval()(x).argmax(dim=1) == target).float().mean()) > 0.95
