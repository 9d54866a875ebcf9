"""A trained network as its users meet it: images as they were decoded in, scores out, in one module.

Shape letters: N images, H height, W width, C channels, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hff.layers import LocalLayer
from hff.network import GreedyNetwork
from orchestrator.data.images.decode import decode


class Classifier(nn.Module):
    """Normalisation, layers and votes together: what is exported, served and asked.

    Takes uint8 images (N, H, W, C) of the network's own size and gives scores (N, K) float32: the weighted sum of
    the layers' log-probabilities, whose softmax are the network's probabilities and whose argmax is its class.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, layers: Sequence[LocalLayer], vote_weights: Sequence[float], data: dict[str, Any]) -> None:
        super().__init__()
        self.network = GreedyNetwork(layers, vote=list(vote_weights))
        dtype = next((t.dtype for t in self.network.parameters()), torch.float32)
        mean, scale = pixel_statistics(data, dtype)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.network(self._normalised(images))
        return scores

    def layers(self) -> list[LocalLayer]:
        return [layer for layer in self.network.layers if isinstance(layer, LocalLayer)]

    def layer_scores(self, images: Tensor) -> list[Tensor]:
        """Log-probabilities (N, K) float32 of each layer alone."""
        logits = self.network.layer_logits(self._normalised(images))
        return [torch.log_softmax(logit_NK.float(), dim=1) for logit_NK in logits]

    def _normalised(self, images: Tensor) -> Tensor:
        x = images.permute(0, 3, 1, 2).to(self.mean.dtype)
        return (x - self.mean) * self.scale


def pixel_statistics(data: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The job's mean and 1 / std for pixels of 0 to 255, both (1, C, 1, 1): x' = (x - mean) * scale."""
    shape = (1, data["channels"], 1, 1)
    mean = torch.tensor(data["mean"], dtype=dtype).view(shape) * 255
    scale = 1 / (torch.tensor(data["std"], dtype=dtype).view(shape) * 255)
    return mean, scale


def framing(data: dict[str, Any]) -> dict[str, Any]:
    """How an image is cropped and resized, where a job says so (a transfer job does)."""
    return {key: data[key] for key in ("crop_share", "interpolation") if data.get(key) is not None}


def pixels(content: bytes, data: dict[str, Any]) -> NDArray[np.uint8]:
    """One JPEG or PNG file as the network wants it, (H, W, C) uint8, as in evaluation. Raises BadImage."""
    return decode(content, image_size=data["image_size"], channels=data["channels"], **framing(data))
