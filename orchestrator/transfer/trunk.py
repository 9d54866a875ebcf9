"""A backbone as a row of stages, each a part of the same model under the model's own names.

A trunk can be cut where its forward pass is a chain of modules, each fed with the very output of the one before.
That is observed, on the meta device, not assumed from the order of the attributes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Isotropic trunks (ViT, MLP-Mixer) never change their resolution: they are cut into this many groups of blocks.
EQUAL_GROUPS = 4
# The stem of a convolutional trunk belongs to its first stage, which ends at this stride.
_FIRST_STRIDE = 4


class NotAChain(Exception):
    """A forward pass that cannot be cut into stages; the text says why."""


@dataclass(frozen=True)
class Cuts:
    """Names of the modules of each stage, in order of execution.

    What runs before the first of them (patch and position embeddings, for example) belongs to the first stage.
    """

    stages: tuple[tuple[str, ...], ...]


class TrunkStage(nn.Module):
    """A part of a backbone; its parameters lie below `trunk` under the backbone's own names.

    The first stage is the backbone itself with everything behind the cut replaced by nothing, so that it embeds
    its image as it always did. With `channels_last` the backbone works on (B, H, W, C) inside; in and out come
    maps (B, C, H, W).
    """

    def __init__(self, trunk: nn.Module, names: Sequence[str], *, opens: bool, channels_last: bool) -> None:
        super().__init__()
        self.trunk = trunk
        self.opens, self.channels_last = opens, channels_last
        self._calls = () if opens else tuple(trunk.get_submodule(name) for name in names)

    def forward(self, x: Tensor) -> Tensor:
        if self.opens:
            trunk: Any = self.trunk
            x = trunk.forward_features(x)
        else:
            x = x.permute(0, 2, 3, 1) if self.channels_last else x
            for call in self._calls:
                x = call(x)
        return x.permute(0, 3, 1, 2) if self.channels_last else x


@dataclass(frozen=True)
class _Call:
    """One call of a module: the tensor that went in (None when it was not one tensor alone) and what came out."""

    name: str
    source: Tensor | None
    result: Any


def _candidates(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules that a cut may lie between: children, those of lists and plain sequences one by one."""
    for name, child in module.named_children():
        plain = isinstance(child, nn.ModuleList) or type(child).forward is nn.Sequential.forward
        if plain and len(list(child.children())):
            yield from _candidates(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


def chain(model: Any, image: Tensor) -> tuple[list[str], set[str]]:
    """Names of the modules at the end of `model.forward_features(image)` that form a chain, and of all called."""
    calls: list[_Call] = []

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
            others = [*args[1:], *kwargs.values()]
            alone = len(args) > 0 and isinstance(args[0], Tensor) and not any(isinstance(a, Tensor) for a in others)
            calls.append(_Call(name, args[0] if alone else None, result))

        return hook

    handles = [m.register_forward_hook(note(name), with_kwargs=True) for name, m in _candidates(model)]
    try:
        with torch.no_grad():
            wanted = model.forward_features(image)
    finally:
        for handle in handles:
            handle.remove()
    links: list[str] = []
    for call in reversed(calls):
        if call.result is not wanted or call.source is None or call.name in links:
            break
        links.append(call.name)
        wanted = call.source
    return links[::-1], {call.name for call in calls}


def find_cuts(links: Sequence[str], info: Sequence[dict[str, Any]] | None) -> Cuts:
    """Group a chain into stages, by the strides in the backbone's own `feature_info`.

    A stage ends where a stride of 4 or more ends; a trunk of one stride is cut into four groups of blocks. Raises
    NotAChain when fewer than two stages come out.
    """
    if not info:
        raise NotAChain("timm does not say where its stages are")
    ends = {entry["reduction"]: entry["module"] for entry in info if entry["reduction"] >= _FIRST_STRIDE}
    marks = list(ends.values())
    if len(marks) == 1:
        modules = [entry["module"] for entry in info]
        groups = min(EQUAL_GROUPS, len(modules))
        marks = [modules[-(-len(modules) * (i + 1) // groups) - 1] for i in range(groups)]
    found = [_position(links, mark) for mark in marks[:-1]]
    borders = sorted({position + 1 for position in found if position is not None})
    borders = [b for b in borders if b < len(links)]
    if not borders:
        raise NotAChain("its forward pass is no chain of modules, one fed with the output of the one before")
    starts, stops = [0, *borders], [*borders, len(links)]
    return Cuts(tuple(tuple(links[a:b]) for a, b in zip(starts, stops, strict=True)))


def _position(links: Sequence[str], mark: str) -> int | None:
    """The last link that is the marked module, lies inside it, or holds it."""
    hits = [i for i, link in enumerate(links) if f"{link}.".startswith(f"{mark}.") or f"{mark}.".startswith(f"{link}.")]
    return hits[-1] if hits else None


def split(model: Any, cuts: Cuts, *, called: set[str]) -> list[TrunkStage]:
    """Take a backbone apart. The model itself becomes the first stage and is of no other use afterwards."""
    channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
    later = [
        TrunkStage(_shell(model, names), names, opens=False, channels_last=channels_last) for names in cuts.stages[1:]
    ]
    unused = [
        name for name, child in _candidates(model) if name not in called and any(True for _ in child.parameters())
    ]
    for name in [*unused, *(n for names in cuts.stages[1:] for n in names)]:
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, nn.Identity())
    return [TrunkStage(model, cuts.stages[0], opens=True, channels_last=channels_last), *later]


def _shell(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """Empty modules that hold the named parts of a model under their names."""
    root = nn.Module()
    for name in names:
        *owners, last = name.split(".")
        where = root
        for owner in owners:
            if owner not in dict(where.named_children()):
                where.add_module(owner, nn.Module())
            where = where.get_submodule(owner)
        where.add_module(last, model.get_submodule(name))
    return root
