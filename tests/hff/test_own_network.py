"""A network of one's own in the library: its shapes are those of what it builds."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hff
from hff.architectures import make_head
from hff.layers import channels_last
from hff.shapes import Shape


class Convs(hff.Architecture):
    def __init__(self, widths: tuple[int, ...] = (8, 16, 16)) -> None:
        self.widths, self.depth = widths, len(widths)

    def body(self, index: int, input_shape: Shape) -> nn.Module:
        width = self.widths[index]
        pool = [nn.MaxPool2d(2)] if index == 1 else []
        conv = nn.Conv2d(input_shape[0], width, 3, padding=1, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU(), *pool)


class Tokens(hff.Architecture):
    """Patches of 4 x 4 pixels, then attention over them."""

    depth = 2
    head_grid = 2

    def body(self, index: int, input_shape: Shape) -> nn.Module:
        return Patches() if index == 0 else nn.TransformerEncoderLayer(12, 2, 24, batch_first=True)


class Patches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 12, 4, stride=4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.embed(x).flatten(2).transpose(1, 2)
        return y


def test_shapes_and_costs_are_those_of_the_built_in_twin() -> None:
    head = hff.HeadShape("prototype", 10, 2)
    for block_size, end_to_end in ((1, False), (2, False), (1, True)):
        own = hff.describe_own(Convs(), (3, 8, 8), head, block_size, end_to_end)
        ours = hff.describe(
            hff.VggOptions(widths=(8, 16, 16), pool_after=(1,)), (3, 8, 8), head, block_size, end_to_end
        )
        for mine, theirs in zip(own, ours, strict=True):
            for key in ("input", "output", "head_features", "parameters", "buffers", "forward_flops", "head_flops"):
                assert getattr(mine, key) == getattr(theirs, key), key
    # Convolution, norm and ReLU each put out a map.
    assert hff.describe_own(Convs(), (3, 8, 8), head)[0].inner.activations == 3 * 8 * 8 * 8  # type: ignore[union-attr]


def test_layers_are_built_alone_as_they_are_built_together() -> None:
    options = hff.HeadOptions(num_classes=10)
    together = hff.build_layers(Convs(), (3, 8, 8), options, seed=3)
    (alone,) = hff.build_layers(Convs(), (3, 8, 8), options, seed=3, only=[1])
    for name, tensor in together[1].state_dict().items():
        assert torch.equal(tensor, alone.state_dict()[name]), name
    assert not torch.equal(together[1].body[0].weight, together[2].body[0].weight)  # type: ignore[index]


def test_a_network_of_tokens_learns_a_batch_by_heart() -> None:
    torch.manual_seed(0)
    layers = hff.build_layers(Tokens(), (3, 16, 16), hff.HeadOptions(num_classes=4), seed=0)
    network = hff.GreedyNetwork(layers)
    optimizers = [hff.make_optimizer(layer, "adamw", lr=3e-3) for layer in layers]
    images, labels = torch.randn(16, 3, 16, 16), torch.arange(16) % 4
    for _ in range(60):
        network.train_step(images, labels, optimizers)
    assert (network.eval()(images).argmax(dim=1) == labels).float().mean() == 1
    assert layers[0].head.features == 12 * 2 * 2


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ([1], "body 0 must be a torch.nn.Module, got list"),
        (nn.Flatten(0), r"body 0 must put out \(2, D\), .* for 2 samples, got \(384,\)"),
        (nn.Sequential(nn.Conv2d(3, 5, 1), nn.Flatten(2)), None),
        (nn.Unflatten(1, (3, 1)), r"body 0 must put out .* got \(2, 3, 1, 8, 8\)"),
    ],
)
def test_a_body_that_cannot_be_a_layer_is_named(body: nn.Module, message: str | None) -> None:
    class One(hff.Architecture):
        depth = 1

        def body(self, index: int, input_shape: Shape) -> nn.Module:
            return body.to("meta") if isinstance(body, nn.Module) else body

    message = message or "body 0 must put out the tokens of a square map, got 5 of them"
    with pytest.raises(ValueError, match=message):
        hff.describe_own(One(), (3, 8, 8), hff.HeadShape("linear", 10))


def test_kernels_of_maps_are_laid_out_anew_and_those_of_volumes_stay() -> None:
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Unflatten(1, (1, 4)), nn.Conv3d(1, 2, 3), nn.Flatten())
    layer = hff.LocalLayer("body0", body, make_head(hff.HeadOptions(num_classes=4), 2 * 2 * 4 * 4, 1)).eval()
    x = torch.randn(2, 3, 8, 8)
    before = layer(x)
    assert channels_last(layer) is layer
    assert body[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert body[2].weight.is_contiguous()
    torch.testing.assert_close(layer(x), before)
