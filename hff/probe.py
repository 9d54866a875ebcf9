"""What a linear classifier can read from features, and how the prototypes of a head lie to one another.

Shape letters: N samples, D features, C classes, M prototypes per class.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# On standardised features; the same before and after the sphere, so that the two can be compared.
RIDGE = 1e-2
_ITERATIONS = 60


def linear_probe(
    feature_ND: Tensor, target_N: Tensor, other_ND: Tensor, num_classes: int, *, ridge: float = RIDGE
) -> Tensor:
    """Classes of other features by logistic regression on these, (N',) int64.

    Features are standardised by the mean and deviation of the first; minimises mean cross-entropy plus
    ridge / 2 |W|^2 by L-BFGS. What linear probes are: Alain and Bengio 2016, arXiv 1610.01644.
    """
    mean_D, deviation_D = feature_ND.mean(dim=0), feature_ND.std(dim=0)
    # A feature that never changes (a dead unit) says nothing: it stays at 0.
    scale_D = torch.where(deviation_D > 1e-8 * (1 + mean_D.abs()), 1 / deviation_D, torch.zeros_like(deviation_D))
    weight_CD = torch.zeros(num_classes, feature_ND.shape[1], dtype=feature_ND.dtype, requires_grad=True)
    bias_C = torch.zeros(num_classes, dtype=feature_ND.dtype, requires_grad=True)
    x_ND = (feature_ND - mean_D) * scale_D
    optimizer = torch.optim.LBFGS(
        [weight_CD, bias_C], max_iter=_ITERATIONS, history_size=10, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(F.linear(x_ND, weight_CD, bias_C), target_N) + ridge / 2 * weight_CD.square().sum()
        torch.autograd.backward(value)
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        return F.linear((other_ND - mean_D) * scale_D, weight_CD, bias_C).argmax(dim=1)


def prototype_similarity(proto_CMD: Tensor) -> Tensor:
    """The greatest cosine between any prototype of one class and any of another, (C, C); 1 on the diagonal.

    Prototypes must be unit-norm.
    """
    classes, prototypes, _ = proto_CMD.shape
    flat = proto_CMD.flatten(0, 1)
    cos = (flat @ flat.T).view(classes, prototypes, classes, prototypes)
    return cos.amax(dim=(1, 3)).fill_diagonal_(1.0)


def prototype_usage(z_ND: Tensor, target_N: Tensor, proto_CMD: Tensor) -> Tensor:
    """How many samples of each class have each of its prototypes as the nearest, (C, M) int64."""
    classes, prototypes, _ = proto_CMD.shape
    nearest_N = torch.einsum("nd,nmd->nm", z_ND, proto_CMD[target_N]).argmax(dim=1)
    return torch.bincount(target_N * prototypes + nearest_N, minlength=classes * prototypes).view(classes, prototypes)
