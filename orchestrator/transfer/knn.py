"""Weighted k nearest neighbours over features: the control that trains nothing.

Shape letters: N known samples, Q queries, D features, C classes, K neighbours.
Source: Wu et al. 2018 (arXiv 1805.01978, section 3.4): cosine similarity, each neighbour votes with exp(s / 0.07);
20 neighbours as in DINO (arXiv 2104.14294).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

NEIGHBOURS = 20
TEMPERATURE = 0.07
_QUERIES = 1024


def nearest(
    known: Iterable[tuple[Tensor, Tensor]], query_QD: Tensor, neighbours: int = NEIGHBOURS
) -> tuple[Tensor, Tensor]:
    """Cosine similarities and classes of the nearest known samples, each (Q, K), the nearest first.

    `known` gives (features (n, D), classes (n,)) piece by piece and is read once; K is `neighbours`, or fewer
    where there are no more. Raises ValueError when nothing is known.
    """
    unit_QD = F.normalize(query_QD.float(), dim=1)
    best_QK = unit_QD.new_empty(len(unit_QD), 0)
    class_QK = unit_QD.new_empty(len(unit_QD), 0, dtype=torch.int64)
    for features, classes in known:
        unit_ND = F.normalize(features.float(), dim=1)
        found = [
            _merged(best_QK[rows], class_QK[rows], unit_QD[rows] @ unit_ND.T, classes, neighbours)
            for rows in _pieces(len(unit_QD))
        ]
        best_QK, class_QK = (torch.cat(parts) for parts in zip(*found, strict=True))
    if not best_QK.shape[1]:
        raise ValueError("no samples are known: neighbours cannot be found")
    return best_QK, class_QK


def _pieces(count: int) -> list[slice]:
    return [slice(i, i + _QUERIES) for i in range(0, max(1, count), _QUERIES)]


def _merged(
    best_QK: Tensor, class_QK: Tensor, cos_QN: Tensor, class_N: Tensor, neighbours: int
) -> tuple[Tensor, Tensor]:
    """The best of those found before and of another piece."""
    new, place = cos_QN.topk(min(neighbours, cos_QN.shape[1]), dim=1)
    both, classes = torch.cat([best_QK, new], dim=1), torch.cat([class_QK, class_N[place]], dim=1)
    kept, order = both.topk(min(neighbours, both.shape[1]), dim=1)
    return kept, classes.gather(1, order)


def knn_votes(
    known: Iterable[tuple[Tensor, Tensor]],
    query_QD: Tensor,
    *,
    num_classes: int,
    neighbours: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
) -> Tensor:
    """Share of the votes that each class gets, (Q, C): every neighbour votes with exp(cosine / temperature)."""
    cos_QK, class_QK = nearest(known, query_QD, neighbours)
    weight_QK = torch.softmax(cos_QK / temperature, dim=1)
    votes_QC = cos_QK.new_zeros(len(cos_QK), num_classes)
    return votes_QC.scatter_add_(1, class_QK, weight_QK)
