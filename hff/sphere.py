"""The unit sphere: normalised features, prototype scores, margin loss.

Shape letters: B batch, D features, C classes, M prototypes per class.
Source: Hyperspherical Forward-Forward, arXiv 2605.00082; where the paper is silent (mean inside the LogSumExp,
where the margin enters) the formulas are this project's choice.
"""

from __future__ import annotations

import math
from typing import Any

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
    return soft_maximum((z_BD @ proto_CMD.flatten(0, 1).T).view(-1, classes, prototypes), sharpness)


def soft_maximum(cos_BCM: Tensor, sharpness: float) -> Tensor:
    """(1/t) log mean_m exp(t cos) of each class's cosines, (B, C)."""
    prototypes = cos_BCM.shape[2]
    if prototypes == 1:
        return cos_BCM.squeeze(2)
    return (torch.logsumexp(sharpness * cos_BCM, dim=-1) - math.log(prototypes)) / sharpness


def cosines(z_BD: Tensor, proto_CMD: Tensor) -> Tensor:
    """Cosines (B, C, M) of unit features to prototypes of any length (one under 1e-6 counts as 1e-6)."""
    classes, prototypes, _ = proto_CMD.shape
    proto_PD = proto_CMD.flatten(0, 1)
    if torch.is_grad_enabled() and proto_PD.requires_grad:
        cos_BP: Tensor = _Cosines.apply(z_BD, proto_PD)
    else:
        cos_BP = _cosines(z_BD, proto_PD)[0]
    return cos_BP.view(-1, classes, prototypes)


def _cosines(z_BD: Tensor, proto_PD: Tensor) -> tuple[Tensor, Tensor]:
    length_P = torch.linalg.vector_norm(proto_PD, dim=1).clamp_min(EPSILON)
    return (z_BD @ proto_PD.T) / length_P, length_P


class _Cosines(torch.autograd.Function):
    """The gradient of a head of millions of numbers costs what it reads and writes of them.

    Scores are divided by the prototypes' lengths, not the prototypes; what that gives back to them is put in place.
    """

    @staticmethod
    def forward(ctx: Any, z_BD: Tensor, proto_PD: Tensor) -> Tensor:
        cos_BP, length_P = _cosines(z_BD, proto_PD)
        ctx.save_for_backward(z_BD, proto_PD, cos_BP, length_P)
        return cos_BP

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor]:
        z_BD, proto_PD, cos_BP, length_P = ctx.saved_tensors
        dot_gradient_BP = gradients[0] / length_P
        along_P = (dot_gradient_BP * cos_BP).sum(0) / length_P
        along_P = torch.where(length_P > EPSILON, along_P, 0)  # where the length is not its own, it has no gradient
        proto_gradient_PD = dot_gradient_BP.T @ z_BD
        proto_gradient_PD.addcmul_(proto_PD, along_P[:, None], value=-1)
        return dot_gradient_BP @ proto_PD if ctx.needs_input_grad[0] else None, proto_gradient_PD


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
