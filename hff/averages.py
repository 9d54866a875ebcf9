"""A running average of a layer's weights, which is often the better network (Polyak and Juditsky 1992)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from hff.layers import Frozen, LocalLayer


class WeightAverage:
    """The exponential moving average of everything in a layer that training changes; `weights` are its tensors.

    Parameters that learn and the statistics of norms are averaged; counters are copied; what is frozen is left out.
    """

    def __init__(self, layer: LocalLayer, decay: float) -> None:
        self.decay = decay
        frozen = tuple(f"{name}." for name, module in layer.named_modules() if isinstance(module, Frozen))
        fixed = {name for name, parameter in layer.named_parameters() if not parameter.requires_grad}
        names = [name for name in layer.state_dict() if name not in fixed and not name.startswith(frozen)]
        # By module and attribute: a forward pass may put another tensor in the place of a buffer.
        self._places = {name: (layer.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names}
        self.weights: dict[str, Tensor] = {name: tensor.clone() for name, tensor in self._live().items()}
        self._averaged = [name for name, tensor in self.weights.items() if tensor.is_floating_point()]
        self._copied = [name for name in names if name not in self._averaged]

    def _live(self) -> dict[str, Tensor]:
        """What is averaged, as the layer has it now."""
        return {name: getattr(module, attribute).detach() for name, (module, attribute) in self._places.items()}

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Take in the layer's weights after its update number `updates`, counted from 0.

        The decay grows to its value as (1 + n) / (10 + n), so that the first weights, which are random, are forgotten.
        """
        decay, live = min(self.decay, (1 + updates) / (10 + updates)), self._live()
        averaged = self._averaged
        torch._foreach_lerp_([self.weights[n] for n in averaged], [live[n] for n in averaged], 1 - decay)
        for name in self._copied:
            self.weights[name].copy_(live[name])

    def restart(self) -> None:
        """Begin again at the layer's weights."""
        live = self._live()
        for name, average in self.weights.items():
            average.copy_(live[name])

    @torch.no_grad()
    def adopt(self) -> None:
        """Make the layer's weights the average."""
        for name, live in self._live().items():
            live.copy_(self.weights[name])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The layer with the average for its weights; its own come back bit for bit."""
        own = {name: live.clone() for name, live in self._live().items()}
        self.adopt()
        try:
            yield
        finally:
            self.restore(own)

    @torch.no_grad()
    def restore(self, own: Mapping[str, Tensor]) -> None:
        """Give the layer weights of its own again; the average stays."""
        for name, live in self._live().items():
            live.copy_(own[name])
