"""Hold out a part of the training data: stratified, and the same for every seed and every run."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hff.randomness import derive_seed
from orchestrator.data.index import Index
from orchestrator.errors import DataError


def split_from_train(index: Index, fraction: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(training samples, held-out samples), both sorted; `fraction` of every class is held out.

    Raises DataError when a class would keep or give nothing.
    """
    whole = np.arange(index.num_samples, dtype=np.int64)
    remedy = "use another data.val.from_train or a separate validation set"
    return hold_out(index, whole, fraction, purpose="split", remedy=remedy)


def hold_out(
    index: Index, subset: NDArray[np.int64], fraction: float, *, purpose: str, remedy: str
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(rest, held-out samples) of a sorted subset; which ones depends on the subset and `purpose` alone.

    Raises DataError, with the remedy, when a class would keep or give nothing.
    """
    random = np.random.Generator(np.random.PCG64(derive_seed(0, purpose)))
    labels = index.labels[subset]
    held_out = []
    for label, name in enumerate(index.classes):
        members = subset[labels == label]
        count = round(len(members) * fraction)
        if not 0 < count < len(members):
            raise DataError(
                f"class {name!r} has {len(members)} samples: {fraction:g} of them cannot be held out; {remedy}"
            )
        held_out.append(random.permutation(members)[:count])
    held = np.sort(np.concatenate(held_out)).astype(np.int64)
    return subset[~np.isin(subset, held)], held


def shuffled_labels(labels: NDArray[np.int64], subset: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """Labels permuted among the samples of `subset`: a control that must end at chance."""
    random = np.random.Generator(np.random.PCG64(derive_seed(seed, "shuffle-labels")))
    result = labels.copy()
    result[subset] = labels[random.permutation(subset)]
    return result
