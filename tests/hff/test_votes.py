"""Fitted votes, against scipy's own optimiser and against what must come out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from hff.votes import RIDGE, fit_vote_weights, vote_loss


def votes(seed: int, samples: int, quality: list[float], classes: int = 5) -> tuple[Tensor, Tensor]:
    """Log-probabilities (N, K, C) of layers that see the truth with more or less noise, and the truth (N,)."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(classes, (samples,), generator=generator)
    truth = torch.nn.functional.one_hot(target, classes).double()
    noise = torch.randn(samples, len(quality), classes, generator=generator, dtype=torch.float64)
    logits = truth[:, None, :] * torch.tensor(quality, dtype=torch.float64)[None, :, None] + noise
    return torch.log_softmax(3 * logits, dim=2), target


def reference_loss(w: np.ndarray, p: np.ndarray, y: np.ndarray) -> float:
    z = np.einsum("k,nkc->nc", w, p)
    z = z - z.max(axis=1, keepdims=True)
    log = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
    return float(-log[np.arange(len(y)), y].mean() + RIDGE / 2 * (w**2).sum())


@pytest.mark.parametrize("quality", [[1.0, 2.0, 1.5], [0.0, 2.0], [-1.0, 1.0, 0.5, 2.0, 0.0]])
@pytest.mark.parametrize("seed", [0, 1])
def test_fitted_weights_are_those_of_a_general_optimiser(quality: list[float], seed: int) -> None:
    log_prob, target = votes(seed, 400, quality)
    ours = fit_vote_weights(log_prob, target)
    p, y = log_prob.numpy(), target.numpy()
    theirs = minimize(
        reference_loss, np.full(len(quality), 0.5), args=(p, y), method="L-BFGS-B", bounds=[(0, None)] * len(quality),
        options={"ftol": 1e-15, "gtol": 1e-10, "maxiter": 10_000},
    )  # fmt: skip
    assert reference_loss(np.array(ours), p, y) <= theirs.fun + 1e-9
    assert ours == pytest.approx(theirs.x, abs=2e-4)
    assert min(ours) >= 0
    assert float(vote_loss(torch.tensor(ours, dtype=torch.float64), log_prob, target)) == pytest.approx(
        reference_loss(np.array(ours), p, y), rel=1e-12
    )


def test_a_layer_that_knows_nothing_gets_no_vote() -> None:
    log_prob, target = votes(0, 3000, [-1.0, 2.0])
    assert fit_vote_weights(log_prob, target)[0] == 0.0


def test_weights_stay_finite_where_every_sample_is_right() -> None:
    log_prob, target = votes(0, 50, [9.0, 9.0])
    weights = fit_vote_weights(log_prob, target)
    assert 0 < max(weights) < 100


def test_equal_layers_share_the_vote() -> None:
    log_prob, target = votes(0, 300, [1.5])
    first, second = fit_vote_weights(torch.cat([log_prob, log_prob], dim=1), target)
    assert first == pytest.approx(second, rel=1e-6)


def test_a_network_of_guessers_still_has_a_vote() -> None:
    log_prob, target = votes(0, 500, [-2.0, -2.0])
    assert fit_vote_weights(log_prob, target) == [0.0, 1.0]


def test_no_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        fit_vote_weights(torch.zeros(0, 2, 3), torch.zeros(0, dtype=torch.int64))
