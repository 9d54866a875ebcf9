"""Classify a data set with the frozen network, through the same pipeline that trains it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hff.votes import fit_vote_weights
from orchestrator.pipeline.stage import Stage, StageInput
from orchestrator.run.context import Control
from orchestrator.run.records.mistakes import Mistake, MistakesOfPart, together


@dataclass(frozen=True)
class Evaluation:
    """Accuracies as fractions of `samples`; `confusion` (K, K) int64 counts samples of class t called p at [t, p].

    `mistakes`: the surest wrong ones, as many as were asked for.
    """

    samples: int
    top1: float
    top5: float
    layer_top1: dict[int, float]
    confusion: Tensor
    mistakes: list[Mistake]


def evaluate(
    stage: Stage,
    batches: Iterator[StageInput] | None,
    *,
    vote_weights: Sequence[float],
    num_classes: int,
    is_last: bool,
    control: Control,
    mistakes: int = 0,
) -> Evaluation | None:
    """Run one pass; every worker calls this and every worker gets the same result.

    `batches` feeds the first stage and is None elsewhere; its last batch is marked `last`. Where one is marked `stop`,
    the same for all replicas, the pass ends with it and there is no result. `vote_weights` has one weight per layer of
    the network. The `mistakes` surest mistakes are kept.
    """
    surest = MistakesOfPart(mistakes)
    correct = torch.zeros(len(stage.layers), dtype=torch.int64, device=stage.device)
    counts = torch.zeros(3, dtype=torch.int64, device=stage.device)
    confusion = torch.zeros(num_classes * num_classes, dtype=torch.int64, device=stage.device)
    while True:
        batch = next(batches) if batches is not None else stage.receive()
        vote = stage.evaluate(batch, vote_weights, correct)
        if is_last and len(batch.target):
            _count(vote, batch.target, counts, confusion, num_classes)
        if is_last and mistakes:
            surest.add(vote, batch.target)
        if batch.stop:
            return None
        if batch.last:
            break
    mine = {
        "correct": {stage.first + i: int(c) for i, c in enumerate(correct)},
        "counts": counts.tolist(),
        "confusion": confusion.cpu() if is_last else None,
        "mistakes": surest if is_last and mistakes else None,
    }
    return _combine(control.gather(mine), num_classes)


def fit_votes(
    stage: Stage, batches: Iterator[StageInput] | None, *, layers: int, replica: int, control: Control
) -> list[float]:
    """Fit a weight for the vote of each of `layers` layers; every worker calls this and gets the same weights.

    `batches` as in `evaluate`: each replica of a stage has its part, in order, of every batch.
    """
    correct = torch.zeros(len(stage.layers), dtype=torch.int64, device=stage.device)
    opinions: list[list[Tensor]] = [[] for _ in stage.layers]
    targets: list[Tensor] = []
    while True:
        batch = next(batches) if batches is not None else stage.receive()
        # Copies: what a link delivers is overwritten by its next message.
        targets.append(batch.target.clone())
        stage.evaluate(batch, (0.0,) * layers, correct, opinions)
        if batch.last:
            break
    mine = {
        "replica": replica,
        "target": [target.cpu() for target in targets],
        "layers": {stage.first + i: [opinion.cpu() for opinion in own] for i, own in enumerate(opinions)},
    }
    parts = control.gather(mine)
    weights: list[float] = control.broadcast(_fitted(parts, layers) if stage.first == 0 and replica == 0 else None)
    return weights


def _fitted(parts: list[dict[str, Any]], layers: int) -> list[float]:
    """Bring samples back into their order and layers into theirs, so that the fit does not depend on the mesh."""
    parts = sorted(parts, key=lambda p: p["replica"])

    def in_order(lists: list[list[Tensor]]) -> Tensor:
        """Batch by batch, in each of them replica by replica."""
        return torch.cat([share for batch in zip(*lists, strict=True) for share in batch])

    log_prob_NKC = torch.stack(
        [in_order([p["layers"][k] for p in parts if k in p["layers"]]) for k in range(layers)], dim=1
    )
    return fit_vote_weights(log_prob_NKC, in_order([p["target"] for p in parts if 0 in p["layers"]]))


def _count(vote: Tensor, target: Tensor, counts: Tensor, confusion: Tensor, num_classes: int) -> None:
    best = vote.topk(min(5, num_classes), dim=1).indices
    hits = best == target[:, None]
    counts[:2] += torch.stack([hits[:, 0].sum(), hits.sum()])
    counts[2] += len(target)
    cells = target * num_classes + best[:, 0]
    confusion += torch.bincount(cells, minlength=num_classes * num_classes)


def _combine(parts: list[dict[str, Any]], num_classes: int) -> Evaluation:
    top1, top5, samples = (sum(p["counts"][i] for p in parts) for i in range(3))
    per_layer: dict[int, int] = {}
    for part in parts:
        for index, right in part["correct"].items():
            per_layer[index] = per_layer.get(index, 0) + right
    confusion = torch.stack([p["confusion"] for p in parts if p["confusion"] is not None]).sum(dim=0)
    total = max(1, samples)
    return Evaluation(
        samples=samples,
        top1=top1 / total,
        top5=top5 / total,
        layer_top1={i: right / total for i, right in sorted(per_layer.items())},
        confusion=confusion.view(num_classes, num_classes),
        mistakes=together([p["mistakes"] for p in parts if p["mistakes"] is not None]),
    )
