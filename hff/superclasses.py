"""Classes joined to super-classes, for early layers that have to tell less apart.

Shape letters: B batch, C classes, G super-classes, D numbers of a class's mean.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def cluster(mean_CD: Tensor, groups: Sequence[int]) -> list[list[int]]:
    """The super-class of every class, for each wanted number of them, nested in one another.

    Ward's agglomeration of the classes' means (scipy); numbered in the order of their first classes. Raises ValueError
    for fewer than 2 super-classes or more than there are classes.
    """
    from scipy.cluster.hierarchy import cut_tree, linkage

    for wanted in groups:
        if not 2 <= wanted <= len(mean_CD):
            raise ValueError(f"super-classes must be from 2 to the {len(mean_CD)} classes, got {wanted}")
    tree = linkage(mean_CD.double().numpy(), method="ward")
    found = []
    for wanted in groups:
        label_C = cut_tree(tree, n_clusters=wanted)[:, 0].tolist()
        number = {label: i for i, label in enumerate(dict.fromkeys(label_C))}
        found.append([number[label] for label in label_C])
    return found


def joined_logits(logit_BC: Tensor, group_C: Tensor, groups: int) -> Tensor:
    """log sum exp of the logits of each super-class's members, (B, G)."""
    index_BC = group_C.expand_as(logit_BC)
    lowest = torch.full((len(logit_BC), groups), -torch.inf, dtype=logit_BC.dtype, device=logit_BC.device)
    # A constant: the log-sum-exp has the same gradient whatever is taken out before exp.
    highest_BG = lowest.scatter_reduce(1, index_BC, logit_BC.detach(), "amax")
    shifted_BC = (logit_BC - highest_BG.gather(1, index_BC)).exp()
    return highest_BG + torch.zeros_like(lowest).scatter_add(1, index_BC, shifted_BC).log()
