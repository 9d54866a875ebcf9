"""Layer bodies and the unit that trains on its own: a body and its head."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hff.objectives import Head, pool_to_grid


class LocalLayer(nn.Module):
    """One locally trained unit: `body` makes the features that go on, `head` judges them."""

    def __init__(self, name: str, body: nn.Module, head: Head) -> None:
        super().__init__()
        self.name, self.body, self.head = name, body, head

    def forward(self, x: Tensor) -> Tensor:
        """The features, without the head."""
        y: Tensor = self.body(x)
        return y

    def logits(self, y: Tensor) -> Tensor:
        """The head's judgement (B, C) of what `forward` gave."""
        return self.judge(y)[1]

    def judge(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """What the head sees of what `forward` gave, (B, features), and its logits (B, C)."""
        return self.head.judge(y)


def channels_last(layer: LocalLayer) -> LocalLayer:
    """The same layer, its kernels of maps in the layout in which convolutions are faster, on CPU and GPU alike."""
    for tensor in (*layer.parameters(), *layer.buffers()):
        if tensor.dim() == 4:  # nn.Module.to would take kernels of volumes too, and fail
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
    return layer


class Frozen(nn.Module):
    """A body, or a part of one, that never learns: always in evaluation mode, no gradients, no optimizer state.

    Its parameters and buffers are saved with the layer like all others.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> Frozen:
        """Stay in evaluation mode, whatever the network around it does."""
        return super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y: Tensor = self.module(x)
        return y


class Pooled(nn.Module):
    """A map (B, C, H, W) or tokens (B, N, D) as what a head would see of them, (B, features)."""

    def __init__(self, grid: int, prefix_tokens: int = 0) -> None:
        super().__init__()
        self.grid, self.prefix_tokens = grid, prefix_tokens

    def forward(self, y: Tensor) -> Tensor:
        return pool_to_grid(y, self.grid, self.prefix_tokens)


def make_norm(norm: str, width: int, *, spatial: bool) -> list[nn.Module]:
    """The norm of a body as a list of none or one module; `spatial` for maps (B, C, H, W)."""
    if norm == "none":
        return []
    if norm == "batch":
        return [nn.BatchNorm2d(width) if spatial else nn.BatchNorm1d(width)]
    if norm == "group" and spatial:
        return [nn.GroupNorm(next(g for g in (32, 16, 8, 4, 2, 1) if width % g == 0), width)]
    if norm == "layer" and not spatial:
        return [nn.LayerNorm(width)]
    raise ValueError(f"norm must be batch, {'group' if spatial else 'layer'} or none, got {norm!r}")


def linear_body(fan_in: int, width: int, *, norm: str, dropout: float) -> nn.Sequential:
    """Flatten, linear, norm, ReLU, dropout."""
    modules: list[nn.Module] = [nn.Flatten(), nn.Linear(fan_in, width, bias=norm == "none")]
    modules += make_norm(norm, width, spatial=False)
    modules.append(nn.ReLU(inplace=norm != "none"))
    if dropout:
        modules.append(nn.Dropout(dropout))
    return nn.Sequential(*modules)


class Shortcut(nn.Module):
    """What a module makes of a map plus the map itself, which has no more channels; the missing ones are zeros.

    Source: He et al., Deep Residual Learning, arXiv 1512.03385, section 3.3, shortcut A: no parameters.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        missing = y.shape[1] - x.shape[1]
        return y + (F.pad(x, (0, 0, 0, 0, 0, missing)) if missing else x)


def conv_body(
    channels: int, width: int, *, kernel: int, stride: int, norm: str, pool: bool, shortcut: bool = False
) -> nn.Sequential:
    """Convolution, norm, ReLU and, where asked, a 2x2 max-pool; a `shortcut` joins before the ReLU."""
    modules: list[nn.Module] = [
        nn.Conv2d(channels, width, kernel, stride=stride, padding=kernel // 2, bias=norm == "none")
    ]
    modules += make_norm(norm, width, spatial=True)
    if shortcut:
        modules = [Shortcut(nn.Sequential(*modules))]
    modules.append(nn.ReLU(inplace=True))
    if pool:
        modules.append(nn.MaxPool2d(2))
    return nn.Sequential(*modules)
