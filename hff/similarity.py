"""A term over the batch: features of one class should lie together on the sphere, those of others apart.

Shape letters: B samples here, N samples of the whole batch over all replicas, D features.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hff.sphere import normalise

# (z_BD, target_B, samples of all replicas) to all samples in order: z_ND, target_N, and the row of the first own one.
Gather = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor, int]]

TEMPERATURE = 0.1


def contrastive_losses(z_ND: Tensor, target_N: Tensor, temperature: float) -> Tensor:
    """Supervised contrastive loss of each sample against all others, (N,); 0 for one without a second of its class.

    -mean_p log(exp(z_i z_p / t) / sum_{a != i} exp(z_i z_a / t)) over the samples p of the class of i. `z_ND` must be
    unit-norm. Source: Khosla et al., Supervised Contrastive Learning, arXiv 2004.11362, eq. 2.
    """
    itself_NN = torch.eye(len(z_ND), dtype=torch.bool, device=z_ND.device)
    # Not -inf: a sample that is alone would have no finite gradient.
    lowest = torch.finfo(z_ND.dtype).min
    logit_NN = (z_ND @ z_ND.T / temperature).masked_fill(itself_NN, lowest)
    log_prob_NN = torch.log_softmax(logit_NN, dim=1)
    same_NN = (target_N[:, None] == target_N) & ~itself_NN
    total_N = log_prob_NN.masked_fill(~same_NN, 0.0).sum(dim=1)
    return -total_N / same_NN.sum(dim=1).clamp(min=1)


class SimilarityTerm(nn.Module):
    """The contrastive loss over the whole batch, whichever replicas hold it, times `weight`.

    `gather` brings the samples of all replicas together; without it there is one replica. The features of the others
    are constants here, and every replica computes the loss of all samples: the gradients add up to that of one process.
    """

    gather: Gather | None = None

    def __init__(self, weight: float, temperature: float = TEMPERATURE) -> None:
        super().__init__()
        self.weight, self.temperature = weight, temperature

    def forward(self, feature_BD: Tensor, target_B: Tensor, count: int) -> Tensor:
        """The sum over the samples here, (); its gradient is that of the sum over all of the `count` samples."""
        z_ND, target_N, first = normalise(feature_BD), target_B, 0
        if self.gather is not None:
            z_ND, target_N, first = self.gather(z_ND, target_B, count)
        loss_N = self.weight * contrastive_losses(z_ND, target_N, self.temperature)
        others = loss_N[:first].sum() + loss_N[first + len(target_B) :].sum()
        # What is reported belongs to these samples; what is differentiated to all.
        return loss_N[first : first + len(target_B)].sum() + others - others.detach()
