"""Early exit: a sample leaves at the first layer that is sure enough, and the layers above are not computed.

How sure is enough is calibrated on samples that no layer has learned from.

Shape letters: N samples, K layers, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NEVER = float("inf")
_CANDIDATES = 1000


@dataclass(frozen=True)
class Beliefs:
    """What the network would say if it stopped behind each layer: how surely, and whether rightly; both (N, K)."""

    confidence: Tensor
    right: Tensor


@dataclass(frozen=True)
class Exit:
    """What comes of a threshold: accuracy, compute as a share of all layers', share of the samples by layer."""

    threshold: float
    top1: float
    compute: float
    leaving: tuple[float, ...]


def beliefs(log_prob_NKC: Tensor, weight_K: Sequence[float], target_N: Tensor) -> Beliefs:
    """Stop behind each layer: its own judgement decides, behind the last one the vote of all."""
    weights = torch.tensor(weight_K, dtype=log_prob_NKC.dtype)
    vote_NC = torch.einsum("k,nkc->nc", weights, log_prob_NKC)
    said_NKC = torch.cat([log_prob_NKC[:, :-1], torch.log_softmax(vote_NC, dim=1)[:, None]], dim=1)
    confidence_NK, choice_NK = said_NKC.exp().max(dim=2)
    return Beliefs(confidence_NK, choice_NK == target_N[:, None])


def exit_layers(confidence_NK: Tensor, threshold: float) -> Tensor:
    """The layer behind which each sample leaves, (N,): the first that is sure enough, or the last."""
    sure_NK = confidence_NK >= threshold
    sure_NK[:, -1] = True
    return sure_NK.int().argmax(dim=1)


def measure(known: Beliefs, cost_K: Sequence[float], whole: float, threshold: float) -> Exit:
    """Accuracy and compute at a threshold.

    `cost_K` is what each layer with its head takes, `whole` what the network takes of a sample without early exit.
    """
    layer_N = exit_layers(known.confidence, threshold)
    paid_K = torch.tensor(cost_K, dtype=torch.float64).cumsum(dim=0)
    right_N = known.right.gather(1, layer_N[:, None])
    leaving_K = torch.bincount(layer_N, minlength=len(cost_K)) / len(layer_N)
    compute = float(paid_K[layer_N].mean()) / whole
    return Exit(threshold, float(right_N.double().mean()), compute, tuple(leaving_K.tolist()))


def calibrate(held: Beliefs, cost_K: Sequence[float], whole: float, tolerated: float) -> float:
    """The lowest threshold down to which accuracy falls by at most `tolerated`, a fraction; NEVER if there is none.

    `held` must be of samples that no layer and no vote has learned from. Raises ValueError without samples.
    """
    if len(held.confidence) == 0:
        raise ValueError("early exit cannot be calibrated without samples")
    least = measure(held, cost_K, whole, NEVER).top1 - tolerated
    found = NEVER
    for threshold in _candidates(held.confidence):
        if measure(held, cost_K, whole, threshold).top1 < least - 1e-12:
            break
        found = threshold
    return found


def _candidates(confidence_NK: Tensor) -> list[float]:
    """Thresholds between which something changes, from the highest; of many, evenly chosen ones."""
    distinct = torch.tensor(sorted(set(confidence_NK[:, :-1].flatten().tolist()), reverse=True))
    step = max(1, len(distinct) // _CANDIDATES)
    return [float(value) for value in distinct[::step]]


def exit_curve(
    held: Beliefs, data: Beliefs, cost_K: Sequence[float], whole: float, tolerances: Sequence[float]
) -> list[tuple[Exit, Exit]]:
    """For each tolerated loss: what its threshold does to the samples it was calibrated on, and to the others."""
    curve = []
    for tolerated in tolerances:
        threshold = calibrate(held, cost_K, whole, tolerated)
        curve.append((measure(held, cost_K, whole, threshold), measure(data, cost_K, whole, threshold)))
    return curve
