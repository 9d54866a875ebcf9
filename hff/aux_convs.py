"""Hidden convolutions of a head: what makes a layer's learning S1."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn
from torch.nn import functional as F

from hff.layers import make_norm
from hff.shapes import aux_side


class AuxConvs(nn.Sequential):
    """`depth` times a 3x3 convolution of the same width, norm and ReLU, on the map at twice the head's grid.

    Source: Belilovsky et al., Greedy Layerwise Learning Can Scale to ImageNet, arXiv 1812.11446, section 3.2.
    """

    def __init__(self, width: int, depth: int, *, grid: int, norm: str) -> None:
        modules: OrderedDict[str, nn.Module] = OrderedDict()
        for i in range(depth):
            modules[f"conv{i}"] = nn.Conv2d(width, width, 3, padding=1, bias=norm == "none")
            for module in make_norm(norm, width, spatial=True):
                modules[f"norm{i}"] = module
            modules[f"relu{i}"] = nn.ReLU(inplace=True)
        super().__init__(modules)
        self.grid = grid

    def forward(self, y: Tensor) -> Tensor:
        """A map (B, C, H, W) to one of at most twice the grid."""
        size = (aux_side(self.grid, y.shape[2]), aux_side(self.grid, y.shape[3]))
        if size != tuple(y.shape[2:]):
            y = F.adaptive_avg_pool2d(y, size)
        for module in self:
            y = module(y)
        return y
