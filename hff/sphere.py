"""The unit sphere: normalised features, prototype scores, margin loss.

Shape letters: B batch, D features, C classes, M prototypes per class.
Source: Hyperspherical Forward-Forward, arXiv 2605.00082; where the paper is silent (mean inside the LogSumExp,
where the margin enters) the formulas are this project's choice.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

EPSILON = 1e-6


def normalise(feature_BD: Tensor) -> Tensor:
    """Project features onto the unit sphere: f / max(|f|, 1e-6).

    Returns (B, D) float32 (float64 stays). Rows of zeros stay zeros and have finite gradients.
    """
    if feature_BD.dtype != torch.float64:
        feature_BD = feature_BD.float()
    return F.normalize(feature_BD, dim=-1, eps=EPSILON)


def prototype_scores(z_BD: Tensor, proto_CMD: Tensor, sharpness: float) -> Tensor:
    """Soft maximum over each class's prototypes of the cosine to a unit feature.

    (1/t) log mean_m exp(t cos): returns (B, C), in [-1, 1]. Both inputs must be unit-norm in the last
    dimension.
    """
    classes, prototypes, _ = proto_CMD.shape
    cos_BCM = (z_BD @ proto_CMD.flatten(0, 1).T).view(-1, classes, prototypes)
    if prototypes == 1:
        return cos_BCM.squeeze(2)
    return (torch.logsumexp(sharpness * cos_BCM, dim=-1) - math.log(prototypes)) / sharpness


def margin_loss(
    logit_BC: Tensor, target_B: Tensor, scale: Tensor, margin: float, label_smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy of a (s - margin at the true class), from logits a s.

    Equals softplus(log sum_{j != y} exp(a (s_j + margin)) - a s_y). Returns (B,).
    """
    if margin:
        shift_BC = F.one_hot(target_B, logit_BC.shape[1]).to(logit_BC.dtype) * margin
        logit_BC = logit_BC - scale * shift_BC
    return F.cross_entropy(logit_BC, target_B, reduction="none", label_smoothing=label_smoothing)
