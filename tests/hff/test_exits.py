"""Early exit: who leaves where, what it costs, and a threshold that keeps its word on the held-out samples."""

from __future__ import annotations

import pytest
import torch

from hff import GreedyNetwork, HeadOptions, MlpOptions, build_layers, calibrate, exit_curve
from hff.exits import NEVER, Beliefs, beliefs, exit_layers, measure

COSTS = (1.0, 2.0, 3.0)
# Four samples, three layers.
KNOWN = Beliefs(
    confidence=torch.tensor([[0.9, 0.5, 0.9], [0.6, 0.8, 0.9], [0.5, 0.6, 0.7], [0.95, 0.9, 0.9]]),
    right=torch.tensor([[True, True, True], [False, True, True], [False, False, True], [False, True, True]]),
)


def test_a_sample_leaves_at_the_first_layer_that_is_sure_enough() -> None:
    assert exit_layers(KNOWN.confidence, 0.8).tolist() == [0, 1, 2, 0]
    assert exit_layers(KNOWN.confidence, NEVER).tolist() == [2, 2, 2, 2]


def test_accuracy_compute_and_shares_of_a_threshold() -> None:
    found = measure(KNOWN, COSTS, 6.0, 0.8)
    assert found.top1 == 3 / 4
    assert found.compute == pytest.approx((1 + 3 + 6 + 1) / 4 / 6)
    assert found.leaving == (0.5, 0.25, 0.25)


def test_the_threshold_is_the_lowest_that_loses_no_more_than_is_tolerated() -> None:
    # Down to 0.95 the last sample leaves wrongly at the first layer; at 0.6 the second one does, too.
    assert calibrate(KNOWN, COSTS, 6.0, 0.0) == NEVER
    assert calibrate(KNOWN, COSTS, 6.0, 0.25) == pytest.approx(0.8)
    assert calibrate(KNOWN, COSTS, 6.0, 1.0) == pytest.approx(0.5)


def test_calibration_without_samples_is_refused() -> None:
    empty = Beliefs(torch.zeros(0, 2), torch.zeros(0, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="without samples"):
        calibrate(empty, (1.0, 1.0), 2.0, 0.1)


def test_the_curve_uses_on_other_samples_what_was_calibrated_on_the_held_out_ones() -> None:
    other = Beliefs(1 - KNOWN.confidence, ~KNOWN.right)
    for held, data in exit_curve(KNOWN, other, COSTS, 6.0, (0.0, 0.25, 1.0)):
        assert held.threshold == data.threshold
        assert held.top1 >= 1 - 1.0
        assert data == measure(other, COSTS, 6.0, held.threshold)


def test_a_layer_speaks_for_itself_and_behind_the_last_one_all_vote() -> None:
    generator = torch.Generator().manual_seed(0)
    log_prob = torch.log_softmax(torch.randn(5, 3, 4, generator=generator), dim=2)
    known = beliefs(log_prob, (0.0, 0.5, 1.0), torch.zeros(5, dtype=torch.int64))
    for k in (0, 1):
        assert torch.allclose(known.confidence[:, k], log_prob[:, k].exp().max(dim=1).values)
        assert known.right[:, k].tolist() == (log_prob[:, k].argmax(dim=1) == 0).tolist()
    last = torch.softmax(0.5 * log_prob[:, 1] + log_prob[:, 2], dim=1)
    assert torch.allclose(known.confidence[:, 2], last.max(dim=1).values)
    assert known.right[:, 2].tolist() == (last.argmax(dim=1) == 0).tolist()


def test_leaving_early_gives_the_classes_and_layers_that_the_measurement_counts() -> None:
    layers = build_layers(MlpOptions(widths=(16, 16, 16)), (1, 4, 4), HeadOptions(num_classes=4), seed=0)
    net = GreedyNetwork(layers, vote=(0.0, 0.5, 1.0)).eval()
    x = torch.randn(40, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        log_prob = torch.stack([torch.log_softmax(logit, dim=1) for logit in net.layer_logits(x)], dim=1)
    threshold = float(beliefs(log_prob, net.weights, torch.zeros(40)).confidence[:, :2].median())
    classes, left_at = net.early_exit(x, threshold)
    known = beliefs(log_prob, net.weights, classes)
    assert len(set(left_at.tolist())) == 3, "samples leave at every layer"
    assert torch.equal(left_at, exit_layers(known.confidence, threshold))
    assert measure(known, COSTS, 6.0, threshold).top1 == 1.0
