"""Local heads: what turns a layer's features into class logits and a loss of its own.

Shape letters: B batch, C classes, G super-classes, M prototypes per class, D features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hff.similarity import SimilarityTerm
from hff.sphere import EPSILON, cosines, margin_loss, normalise, soft_maximum
from hff.superclasses import joined_logits


def pool_to_grid(y: Tensor, grid: int, prefix_tokens: int = 0) -> Tensor:
    """Pool a map (B, C, H, W) to at most grid x grid and flatten; (B, D) stays.

    Tokens (B, N, D) become a square map without their first `prefix_tokens` (class and register tokens).
    """
    if y.dim() == 3:
        y = y[:, prefix_tokens:].transpose(1, 2)
        side = math.isqrt(y.shape[2])
        y = y.reshape(y.shape[0], y.shape[1], side, side)
    if y.dim() == 4:
        size = (min(grid, y.shape[2]), min(grid, y.shape[3]))
        if size != tuple(y.shape[2:]):
            y = pool_to_cells(y, size)
    return y.flatten(1)


def pool_to_cells(y: Tensor, size: tuple[int, int]) -> Tensor:
    """Average a map (B, C, H, W) to (B, C, *size)."""
    even = all(length % cells == 0 for length, cells in zip(y.shape[2:], size, strict=True))
    if even and y.requires_grad and torch.is_grad_enabled():
        pooled: Tensor = _EvenPool.apply(y, size)
        return pooled
    return F.adaptive_avg_pool2d(y, size)


class _EvenPool(torch.autograd.Function):
    """Average pooling of a map into cells of one size.

    torch's own gradient is filled with zeros, added up and copied to the map's memory format; here each cell is
    written once, in that format: a third of the time of the whole chain on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, size: tuple[int, int]) -> Tensor:
        ctx.shape = y.shape
        ctx.memory_format = torch.channels_last if y.is_contiguous(memory_format=torch.channels_last) else None
        return F.adaptive_avg_pool2d(y, size)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0]
        _, _, height, width = ctx.shape
        cells = height * width // (gradient.shape[2] * gradient.shape[3])
        shared = (gradient / cells).contiguous(memory_format=ctx.memory_format or torch.contiguous_format)
        return F.interpolate(shared, size=(height, width), mode="nearest"), None


class Head(nn.Module):
    """Features to class logits, and the loss that trains one layer. `grid` pools maps before flattening.

    `aux` are hidden convolutions before the pooling, `similarity` a term over the batch beside the loss.
    """

    # Tokens at the front of (B, N, D) that stand for no place in the image.
    prefix_tokens = 0
    # The super-class of each class, where the layer learns these alone, and how many there are.
    group_C: Tensor | None
    groups = 0

    def __init__(self, features: int, num_classes: int, grid: int, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.features, self.num_classes = features, num_classes
        self.grid, self.label_smoothing = grid, label_smoothing
        self.aux: nn.Module | None = None
        self.similarity: SimilarityTerm | None = None
        # Not saved: it is needed for nothing but training.
        self.register_buffer("group_C", None, persistent=False)

    def flat(self, y: Tensor) -> Tensor:
        """What the head sees of a layer's output, (B, features), never in reduced precision."""
        if self.aux is not None:
            y = self.aux(y if y.dtype == torch.float64 else y.float())
        y = pool_to_grid(y, self.grid, self.prefix_tokens)
        return y if y.dtype == torch.float64 else y.float()

    def forward(self, y: Tensor) -> Tensor:
        """Logits (B, C) of a layer's output."""
        return self.judge(y)[1]

    def judge(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """What the head sees of a layer's output, (B, features), and its logits (B, C)."""
        if not torch.is_autocast_enabled(y.device.type):  # an exported graph then has no autocast region
            feature_BD = self.flat(y)
            return feature_BD, self.logits(feature_BD)
        with torch.autocast(y.device.type, enabled=False):
            feature_BD = self.flat(y)
            return feature_BD, self.logits(feature_BD)

    def logits(self, feature_BD: Tensor) -> Tensor:
        raise NotImplementedError

    def loss(self, logit_BC: Tensor, target_B: Tensor) -> Tensor:
        """Loss of each sample, (B,)."""
        logit_BG, target_B = self.joined(logit_BC, target_B)
        return F.cross_entropy(logit_BG, target_B, reduction="none", label_smoothing=self.label_smoothing)

    def over_batch(self, feature_BD: Tensor, target_B: Tensor, count: int) -> Tensor | None:
        """What the loss of these samples, (), has beside that of each; None where nothing."""
        if self.similarity is None:
            return None
        if self.group_C is not None:
            target_B = self.group_C[target_B]
        over_batch: Tensor = self.similarity(feature_BD, target_B, count)
        return over_batch

    def joined(self, logit_BC: Tensor, target_B: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and targets of what the layer learns: of the super-classes, or the classes as they are.

        A super-class is as likely as its members together.
        """
        if self.group_C is None:
            return logit_BC, target_B
        return joined_logits(logit_BC, self.group_C, self.groups), self.group_C[target_B]

    def learn_groups(self, group_C: Sequence[int]) -> None:
        """Tell apart the super-classes alone, that of each class given; the logits stay those of the classes."""
        self.groups, self.group_C = max(group_C) + 1, torch.tensor(group_C)

    def correct(self, logit_BC: Tensor, target_B: Tensor) -> Tensor:
        """Which samples are classified rightly, (B,) bool: what the accuracy of training counts."""
        logit_BG, target_B = self.joined(logit_BC, target_B)
        return logit_BG.argmax(dim=1) == target_B

    def constrain_(self) -> None:
        """Bring the parameters back to where they belong after an update."""


class LinearHead(Head):
    """A linear classifier with cross-entropy: the "pred" loss of Noekland and Eidnes 2019, Mono-Forward 2025."""

    def __init__(self, features: int, num_classes: int, *, grid: int, label_smoothing: float = 0.0) -> None:
        super().__init__(features, num_classes, grid, label_smoothing)
        self.linear = nn.Linear(features, num_classes)

    def logits(self, feature_BD: Tensor) -> Tensor:
        logit_BC: Tensor = self.linear(feature_BD)
        return logit_BC


class PrototypeHead(Head):
    """Unit features against learned unit prototypes, scaled and with a margin (HFF, arXiv 2605.00082).

    The scale is learnable inside [scale_min, scale_max] through a sigmoid; with `learn_scale` false it stays at
    `scale`. Raises ValueError unless 0 < scale_min < scale < scale_max (when it learns).
    """

    def __init__(
        self,
        features: int,
        num_classes: int,
        *,
        grid: int,
        prototypes_per_class: int = 1,
        margin: float = 0.0,
        scale: float = 32.0,
        scale_min: float = 16.0,
        scale_max: float = 64.0,
        learn_scale: bool = True,
        sharpness: float = 10.0,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(features, num_classes, grid, label_smoothing)
        if learn_scale and not 0 < scale_min < scale < scale_max:
            raise ValueError(f"scale must lie between scale_min {scale_min} and scale_max {scale_max}, got {scale}")
        self.margin, self.sharpness, self.learn_scale = margin, sharpness, learn_scale
        self.scale_min, self.scale_max, self.fixed_scale = scale_min, scale_max, scale
        self.prototypes = nn.Parameter(torch.randn(num_classes, prototypes_per_class, features))
        start = math.log((scale - scale_min) / (scale_max - scale)) if learn_scale else 0.0
        self.raw_scale = nn.Parameter(torch.tensor(start), requires_grad=learn_scale)
        self.constrain_()

    @property
    def scale(self) -> Tensor:
        """The factor between cosines and logits, a scalar."""
        if not self.learn_scale:
            return torch.full_like(self.raw_scale, self.fixed_scale)
        return self.scale_min + (self.scale_max - self.scale_min) * torch.sigmoid(self.raw_scale)

    def unit_prototypes(self) -> Tensor:
        """The prototypes on the sphere, (C, M, D)."""
        return F.normalize(self.prototypes, dim=-1, eps=EPSILON)

    def logits(self, feature_BD: Tensor) -> Tensor:
        return self.scale * soft_maximum(cosines(normalise(feature_BD), self.prototypes), self.sharpness)

    def loss(self, logit_BC: Tensor, target_B: Tensor) -> Tensor:
        logit_BG, target_B = self.joined(logit_BC, target_B)
        return margin_loss(logit_BG, target_B, self.scale, self.margin, self.label_smoothing)

    def joined(self, logit_BC: Tensor, target_B: Tensor) -> tuple[Tensor, Tensor]:
        """As every head's; the score of a super-class is that of all its members' prototypes as if of one class."""
        if self.group_C is None:
            return logit_BC, target_B
        soft_BG = joined_logits(logit_BC * (self.sharpness / self.scale), self.group_C, self.groups)
        size_G = torch.bincount(self.group_C, minlength=self.groups)
        return (soft_BG - size_G.log()) * (self.scale / self.sharpness), self.group_C[target_B]

    @torch.no_grad()
    def constrain_(self) -> None:
        # Only their directions count; keeping them at length one keeps their learning rate constant.
        length_CM = torch.linalg.vector_norm(self.prototypes, dim=-1, keepdim=True)
        self.prototypes.div_(length_CM.clamp_min(EPSILON))
