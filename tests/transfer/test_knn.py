"""k nearest neighbours against scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from orchestrator.transfer import knn


@pytest.mark.parametrize("pieces", [1, 7])
def test_votes_are_those_of_scikit_learn_whatever_the_pieces(pieces: int) -> None:
    random = np.random.default_rng(0)
    centres = random.standard_normal((4, 16))
    classes = random.integers(0, 4, 500)
    known = (centres[classes] + 2 * random.standard_normal((500, 16))).astype(np.float32)
    queries = random.standard_normal((1500, 16)).astype(np.float32)
    theirs = KNeighborsClassifier(20, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07)).fit(known, classes)
    parts = zip(torch.from_numpy(known).chunk(pieces), torch.from_numpy(classes).chunk(pieces), strict=True)
    votes = knn.knn_votes(parts, torch.from_numpy(queries), num_classes=4)
    assert np.allclose(votes.numpy(), theirs.predict_proba(queries), atol=2e-4)


def test_fewer_samples_than_neighbours_all_vote_and_none_at_all_is_an_error() -> None:
    known = [(torch.eye(3)[:2], torch.tensor([2, 0]))]
    votes = knn.knn_votes(known, torch.tensor([[2.0, 0.0, 0.0]]), num_classes=3, temperature=1.0)
    e = np.e
    assert votes.numpy() == pytest.approx(np.array([[1 / (1 + e), 0, e / (1 + e)]]), abs=1e-6)
    with pytest.raises(ValueError, match="no samples are known"):
        knn.nearest([], torch.eye(3))
