"""The original Forward-Forward: labels in the input, goodness high for right ones and low for wrong ones.

Source: Hinton, The Forward-Forward Algorithm, arXiv 2212.13345, sections 2 and 3.3. An image comes in several
versions that differ in the label written over its first numbers: two in training (right, wrong), one per class when
it is classified.

Shape letters: B batch, K versions of an image, C classes, D numbers of one version.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hff.layers import LocalLayer
from hff.objectives import Head

_IMAGE_DIMENSIONS = 4
_EPSILON = 1e-8


def write_labels(x: Tensor, label_BK: Tensor, num_classes: int) -> Tensor:
    """Each image (B, ...) once for each of its labels, (B, K, ...).

    The first `num_classes` numbers become 0, that of the label the largest of the image. Raises ValueError for images
    of fewer numbers.
    """
    x_BD = x.flatten(1)
    if num_classes > x_BD.shape[1]:
        raise ValueError(f"{num_classes} labels do not fit into images of {x_BD.shape[1]} numbers")
    one_hot_BKC = F.one_hot(label_BK, num_classes).to(x.dtype) * x_BD.amax(dim=1)[:, None, None]
    rest_BKD = x_BD[:, None, num_classes:].expand(-1, label_BK.shape[1], -1)
    return torch.cat([one_hot_BKC, rest_BKD], dim=2).view(*label_BK.shape, *x.shape[1:])


class GoodnessHead(Head):
    """Goodness of each version, the mean square of its activities, against a threshold; has no parameters."""

    def __init__(self, num_classes: int, *, threshold: float, sharpness: float = 1.0) -> None:
        super().__init__(0, num_classes, grid=1)
        self.threshold, self.sharpness = threshold, sharpness

    def forward(self, y: Tensor) -> Tensor:
        """Goodness (B, K) of activities (B, K, ...): with a version per class, the class logits."""
        y = y if y.dtype == torch.float64 else y.float()
        return y.flatten(2).square().mean(dim=2)

    def judge(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Goodness, twice: it is all that the head sees."""
        goodness_BK = self.forward(y)
        return goodness_BK, goodness_BK

    def loss(self, logit_BC: Tensor, target_B: Tensor) -> Tensor:
        """-log p(right version is right) - log p(wrong one is wrong), (B,), from the goodness of pairs (B, 2).

        p = sigmoid(sharpness (goodness - threshold)); with the width as sharpness, goodness is the paper's sum of
        squares.
        """
        right_B, wrong_B = (self.sharpness * (logit_BC - self.threshold)).unbind(dim=1)
        return F.softplus(-right_B) + F.softplus(wrong_B)

    def correct(self, logit_BC: Tensor, target_B: Tensor) -> Tensor:
        """Which pairs are told apart, (B,) bool."""
        return logit_BC[:, 0] > logit_BC[:, 1]


class GoodnessLayer(LocalLayer):
    """A layer that sees every version of an image by its direction alone.

    How good the layer before found it is its length there, which is taken away. The first layer of a network
    (`entry`) takes images (B, C, H, W), too, and makes a version per class of each.
    """

    def __init__(self, name: str, body: nn.Module, head: GoodnessHead, *, entry: bool) -> None:
        super().__init__(name, body, head)
        self.entry = entry
        for module in body.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                _begin_at_threshold_(module, head.threshold)

    def forward(self, x: Tensor) -> Tensor:
        """Activities (B, K, ...) of versions (B, K, ...)."""
        if self.entry and x.dim() == _IMAGE_DIMENSIONS:
            classes = self.head.num_classes
            x = write_labels(x, torch.arange(classes, device=x.device).expand(x.shape[0], -1), classes)
        versions = x.flatten(0, 1)
        y: Tensor = self.body(_of_length_one(versions))
        return y.reshape(*x.shape[:2], *y.shape[1:])


@torch.no_grad()
def _begin_at_threshold_(module: nn.Linear | nn.Conv2d, threshold: float) -> None:
    """Draw weights that give inputs of mean square 1 a goodness of about the threshold behind a ReLU.

    Far from it, all versions of an image are pushed the same way first, and layers can stay dead.
    """
    fan_in = module.weight[0].numel()
    nn.init.normal_(module.weight, std=math.sqrt(2 * threshold / fan_in))
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def _of_length_one(x: Tensor) -> Tensor:
    """Rows scaled to a mean square of 1, so that a layer's width does not matter to the next."""
    mean = x.flatten(1).square().mean(dim=1)
    return x * torch.rsqrt(mean + _EPSILON).view(-1, *[1] * (x.dim() - 1))
