"""Search one layer after the other, which local losses allow: a settled layer never changes again.

All candidates for layer k start from the checkpoint of the best candidate for layer k - 1 and train layer k alone.
Cost grows with the sum of the layers' spaces instead of their product. Pure decisions over the record.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.job.search import LAYER_KEYS
from orchestrator.search.record import Trial, best


def layer_of(index: int, samples: int) -> int:
    """The layer that trial `index` is a candidate for."""
    return index // samples


def winner(trials: Sequence[Trial], layer: int, sign: int) -> Trial | None:
    """The best finished candidate for a layer."""
    return best([t for t in trials if t.layer == layer], sign)


def next_index(trials: Sequence[Trial], samples: int, layers: int, sign: int) -> int | None:
    """The next trial to start; None while the layer before is not settled, or when all have been started.

    A layer is settled when each of its candidates has ended and one of them has finished.
    """
    index = len(trials)
    layer = layer_of(index, samples)
    if layer >= layers:
        return None
    before = [t for t in trials if t.layer == layer - 1]
    if layer > 0 and (not all(t.ended for t in before) or winner(trials, layer - 1, sign) is None):
        return None
    return index


def failed_layer(trials: Sequence[Trial], samples: int) -> int | None:
    """The layer whose candidates have all ended without one that finished: the search cannot go on."""
    for layer in sorted({t.layer for t in trials if t.layer is not None}):
        of_layer = [t for t in trials if t.layer == layer]
        if len(of_layer) == samples and all(t.ended and t.status != "finished" for t in of_layer):
            return layer
    return None


def chain(trials: Sequence[Trial], trial: Trial) -> list[Trial]:
    """The trials that settled the layers below, and the trial itself, from the bottom."""
    by_index = {t.index: t for t in trials}
    found = [trial]
    while found[0].parent is not None:
        found.insert(0, by_index[found[0].parent])
    return found


def per_layer(trials: Sequence[Trial], trial: Trial) -> list[dict[str, Any]]:
    """The `per_layer` section of a trial's job: what each settled layer got, then its own candidate's values."""
    return [layer_entry(t.values) for t in chain(trials, trial)]


def layer_entry(values: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of `per_layer` from values by key path."""
    return {LAYER_KEYS[path]: value for path, value in values.items()}
