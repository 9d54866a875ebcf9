"""Linear probes against scikit-learn, prototypes against plain loops."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from hff.probe import RIDGE, linear_probe, prototype_similarity, prototype_usage
from hff.sphere import normalise


def test_a_probe_finds_the_classes_that_scikit_learn_finds() -> None:
    x, y = load_digits(return_X_y=True)
    scaler = StandardScaler().fit(x[:1000])
    # scikit-learn weighs the sum of losses by C and has |W|^2 / 2; ours weighs |W|^2 / 2 beside the mean.
    model = LogisticRegression(C=1 / (RIDGE * 1000), max_iter=2000, tol=1e-8).fit(scaler.transform(x[:1000]), y[:1000])
    expected = model.predict(scaler.transform(x[1000:]))
    found = linear_probe(torch.from_numpy(x[:1000]), torch.from_numpy(y[:1000]), torch.from_numpy(x[1000:]), 10)
    assert (found.numpy() == expected).mean() > 0.995
    assert (found.numpy() == y[1000:]).mean() > 0.9


def test_a_dead_feature_changes_nothing() -> None:
    x, y = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
    with_dead = torch.cat([x, torch.full((len(x), 1), 7.25, dtype=x.dtype)], dim=1)
    plain = linear_probe(x[:500], y[:500], x[500:], 10)
    assert torch.equal(linear_probe(with_dead[:500], y[:500], with_dead[500:], 10), plain)


def some_prototypes() -> torch.Tensor:
    return normalise(torch.randn(5, 3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64))


def test_similarity_is_the_greatest_cosine_between_two_classes() -> None:
    proto = some_prototypes()
    found = prototype_similarity(proto)
    for a in range(5):
        for b in range(5):
            expected = 1.0 if a == b else max(float(p @ q) for p in proto[a] for q in proto[b])
            assert abs(float(found[a, b]) - expected) < 1e-12


def test_usage_counts_the_nearest_prototype_of_a_samples_own_class() -> None:
    proto = some_prototypes()
    z = normalise(torch.randn(40, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    target = torch.arange(40) % 5
    expected = np.zeros((5, 3), dtype=int)
    for sample, label in zip(z, target.tolist(), strict=True):
        expected[label, int(np.argmax([float(sample @ p) for p in proto[label]]))] += 1
    assert prototype_usage(z, target, proto).tolist() == expected.tolist()
