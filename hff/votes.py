"""Weights for a vote of all layers, fitted on samples that no layer has learned from.

Shape letters: N samples, K layers, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Where the layers separate the samples perfectly, larger weights are always better: this keeps them finite.
RIDGE = 1e-4
_STEPS = 100
_TOLERANCE = 1e-10


def vote_loss(weight_K: Tensor, log_prob_NKC: Tensor, target_N: Tensor) -> Tensor:
    """Mean cross-entropy of softmax(sum_k w_k log p_k), plus RIDGE / 2 |w|^2; convex in the weights."""
    logit_NC = torch.einsum("k,nkc->nc", weight_K, log_prob_NKC)
    return torch.nn.functional.cross_entropy(logit_NC, target_N) + RIDGE / 2 * weight_K.square().sum()


def fit_vote_weights(log_prob_NKC: Tensor, target_N: Tensor) -> list[float]:
    """The weights >= 0, one per layer, that minimise `vote_loss`.

    Projected Newton's method (Bertsekas 1982), exact and without a step size to choose; computes in float64.
    Raises ValueError without samples.
    """
    if len(target_N) == 0:
        raise ValueError("vote weights need at least one sample")
    log_prob_NKC, layers = log_prob_NKC.double(), log_prob_NKC.shape[1]
    weight_K = torch.full((layers,), 1.0 / layers, dtype=torch.float64)
    for _ in range(_STEPS):
        gradient_K, hessian_KK = _derivatives(weight_K, log_prob_NKC, target_N)
        # A weight at zero that would fall further stays there; Newton's step is taken in the others.
        free = (weight_K > 0) | (gradient_K < 0)
        if not free.any() or gradient_K[free].abs().max() < _TOLERANCE:
            break
        step_K = torch.zeros_like(weight_K)
        step_K[free] = torch.linalg.solve(hessian_KK[free][:, free], gradient_K[free])
        moved_K = _search(weight_K, step_K, gradient_K, log_prob_NKC, target_N)
        if torch.equal(moved_K, weight_K):
            break
        weight_K = moved_K
    if not weight_K.any():
        # Nobody is better than guessing: the vote is still somebody's.
        weight_K[-1] = 1.0
    return [float(w) for w in weight_K]


def _derivatives(weight_K: Tensor, log_prob_NKC: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient (K,) and Hessian (K, K) of `vote_loss`."""
    samples, layers, _ = log_prob_NKC.shape
    prob_NC = torch.softmax(torch.einsum("k,nkc->nc", weight_K, log_prob_NKC), dim=1)
    mean_NK = torch.einsum("nc,nkc->nk", prob_NC, log_prob_NKC)
    true_NK = log_prob_NKC[torch.arange(samples), :, target_N]
    gradient_K = (mean_NK - true_NK).mean(dim=0) + RIDGE * weight_K
    centred_NKC = (log_prob_NKC - mean_NK[:, :, None]) * prob_NC.sqrt()[:, None, :]
    flat_KM = centred_NKC.transpose(0, 1).reshape(layers, -1)
    hessian_KK = flat_KM @ flat_KM.T / samples + RIDGE * torch.eye(layers, dtype=torch.float64)
    return gradient_K, hessian_KK


def _search(weight_K: Tensor, step_K: Tensor, gradient_K: Tensor, log_prob_NKC: Tensor, target_N: Tensor) -> Tensor:
    """The first of ever shorter projected steps that lowers the loss enough (Armijo's rule)."""
    before = vote_loss(weight_K, log_prob_NKC, target_N)
    length = 1.0
    while length > 1e-12:
        moved_K = (weight_K - length * step_K).clamp(min=0)
        gain = torch.dot(gradient_K, weight_K - moved_K)
        if vote_loss(moved_K, log_prob_NKC, target_N) <= before - 1e-4 * gain:
            return moved_K
        length /= 2
    return weight_K
