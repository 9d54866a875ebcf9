"""A greedy network in one process: every layer learns alone, all may vote.

Shape letters: B batch, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from hff.layers import LocalLayer
from hff.local import LocalUpdate, local_forward_backward, local_update

Vote = str | Sequence[float]


def vote_weights(vote: Vote, layers: int) -> tuple[float, ...]:
    """Weight of each layer's vote: `last`, `equal`, or one non-negative number per layer."""
    if vote == "last":
        return (0.0,) * (layers - 1) + (1.0,)
    if vote == "equal":
        return (1.0 / layers,) * layers
    if isinstance(vote, str):
        raise ValueError(f"vote must be last, equal or one weight per layer, got {vote!r}")
    weights = tuple(float(w) for w in vote)
    if len(weights) != layers or min(weights) < 0 or max(weights) == 0:
        raise ValueError(f"vote needs {layers} weights >= 0, not all zero, got {list(weights)}")
    return weights


class GreedyNetwork(nn.Module):
    """Layers in order; each hands on its detached output."""

    def __init__(self, layers: Sequence[LocalLayer], vote: Vote = "last") -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.weights = vote_weights(vote, len(layers))

    def _layers(self) -> list[LocalLayer]:
        return [layer for layer in self.layers if isinstance(layer, LocalLayer)]

    def layer_logits(self, x: Tensor) -> list[Tensor]:
        """Logits (B, C) of every layer."""
        return [layer.logits(y) for layer, y in self._outputs(x)]

    def _outputs(self, x: Tensor) -> Iterator[tuple[LocalLayer, Tensor]]:
        for layer in self._layers():
            x = layer(x)
            yield layer, x

    def forward(self, x: Tensor) -> Tensor:
        """Weighted sum of the layers' log-probabilities, (B, C) float32: the class is its argmax."""
        votes = [
            weight * torch.log_softmax(layer.logits(y).float(), dim=1)
            for weight, (layer, y) in zip(self.weights, self._outputs(x), strict=True)
            if weight
        ]
        return torch.stack(votes).sum(dim=0)

    @torch.no_grad()
    def early_exit(self, x: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
        """Class (B,) and last computed layer (B,) of each sample, computing no layer for those that have left.

        A sample leaves behind the first layer that finds its class at least as likely as `threshold` (`hff.exits`
        calibrates it) and gets that class; behind the last layer all vote.
        """
        chosen = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        left_at = torch.full_like(chosen, len(self.weights) - 1)
        still, vote = torch.arange(len(x), device=x.device), torch.zeros((), device=x.device)
        for index, (layer, weight) in enumerate(zip(self._layers(), self.weights, strict=True)):
            x = layer(x)
            log_prob_BC = torch.log_softmax(layer.logits(x).float(), dim=1)
            vote = vote + weight * log_prob_BC
            if index == len(self.weights) - 1:
                chosen[still] = vote.argmax(dim=1)
                break
            confidence_B, choice_B = log_prob_BC.exp().max(dim=1)
            stays = confidence_B < threshold
            chosen[still[~stays]], left_at[still[~stays]] = choice_B[~stays], index
            still, x, vote = still[stays], x[stays], vote[stays]
            if not len(still):
                break
        return chosen, left_at

    def train_step(self, x: Tensor, target: Tensor, optimizers: Sequence[torch.optim.Optimizer]) -> list[LocalUpdate]:
        """One greedy step: each layer trains on the batch and hands on its output."""
        updates = []
        for layer, optimizer in zip(self._layers(), optimizers, strict=True):
            layer.train()
            update = local_forward_backward(layer, x, target, count=len(target))
            local_update(layer, optimizer)
            updates.append(update)
            x = update.output
        return updates

    def hand_on(self, y: Tensor) -> Tensor:
        """What the next layer gets: the values without their history."""
        return y.detach()

    def local_losses(self, x: Tensor, target: Tensor) -> list[Tensor]:
        """Mean loss of every layer with its graph kept, for the audit."""
        losses = []
        for layer in self._layers():
            y = layer(x)
            feature_BD, logit_BC = layer.judge(y)
            loss, over_batch = layer.head.loss(logit_BC, target), layer.head.over_batch(feature_BD, target, len(target))
            losses.append(loss.mean() if over_batch is None else (loss.sum() + over_batch) / len(target))
            x = self.hand_on(y)
        return losses
