"""What a stage of some layers and replicas takes per step and holds in memory, for all stages at once. No torch.

Shape letters: L layers, D choices of a number of replicas.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hff.shapes import LayerShape
from orchestrator.pipeline.cost import OPTIMIZER_STATE, LayerCost, Target, kept_numbers, learned
from orchestrator.pipeline.mesh import SLOTS

# Sums over replicas that a batch norm makes: mean and variance, and the gradients of both.
_NORM_SUMS = 4
_LABEL_BYTES = 8

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Load:
    """A network and how it is trained: layers, their costs, the global batch and the sizes of numbers in bytes.

    `activation_bytes` is the size of a number between two stages. A layer trains on its share of a batch in
    `micro_batches` parts.
    """

    shapes: Sequence[LayerShape]
    costs: Sequence[LayerCost]
    batch: int
    num_classes: int
    optimizer: str = "adamw"
    dtype_bytes: int = 4
    activation_bytes: int = 4
    micro_batches: int = 1

    def sent_bytes(self, layer: int) -> int:
        """Bytes of a sample's output and label behind a layer."""
        return self.activation_bytes * math.prod(self.shapes[layer].output) + _LABEL_BYTES


@dataclass(frozen=True)
class StageSeconds:
    """Seconds of a stage in one step.

    `work_s` is all that its workers do or wait for among themselves; of it `layers_s` are forward, gradients and
    updates, `sums_s` what sums over replicas add and `copy_s` the filling of a send buffer. The output leaves
    `after_send_s` before the end. `out_s` and `in_s` occupy each direction of a worker's link beside the work.
    """

    work_s: float
    layers_s: float
    sums_s: float
    copy_s: float
    after_send_s: float
    out_s: float
    in_s: float

    @property
    def period_s(self) -> float:
        return max(self.work_s, self.out_s, self.in_s)


class StageCosts:
    """Tables over every range of layers and every number of replicas in `replicas`, each a divisor of the batch."""

    def __init__(self, load: Load, target: Target, replicas: Sequence[int]) -> None:
        self.load, self.target, self.replicas = load, target, tuple(replicas)
        count_D = np.array(replicas, dtype=np.float64)
        self._share_D = load.batch / count_D
        sample_L = np.array([c.sample_s for c in load.costs])
        self._step_L = np.array([c.step_s for c in load.costs]) + (load.micro_batches - 1) * target.overhead_s
        layers_LD = sample_L[:, None] * self._share_D + self._step_L[:, None]
        # A tree up and down; none for a worker alone.
        latency_D = 2 * np.ceil(np.log2(count_D)) * target.link_latency_s
        gradient_L = np.array([load.dtype_bytes * learned(s) for s in load.shapes], dtype=np.float64)
        self._wire_LD = gradient_L[:, None] * 2 * (count_D - 1) / count_D / target.link_bytes_per_s
        self._sum_LD = self._wire_LD + latency_D
        norms_L = np.array([_NORM_SUMS * bool(s.buffers) for s in load.shapes])
        # The gradients of a layer are summed while the next one computes.
        hidden_LD = np.vstack([layers_LD[1:], np.zeros((1, len(count_D)))])
        exposed_LD = np.maximum(0.0, self._sum_LD - hidden_LD)
        self._layers = _prefix(layers_LD)
        self._norms = _prefix(norms_L[:, None] * latency_D)
        self._exposed = _prefix(exposed_LD)
        self._wire = _prefix(self._wire_LD)
        self._sent_L = np.array([load.sent_bytes(i) for i in range(len(load.shapes))], dtype=np.float64)
        self._sent_L[-1] = 0.0

    def stage(self, first: int, last: int, option: int) -> StageSeconds:
        """One stage of the layers first .. last."""
        parts = self._parts(first)
        return StageSeconds(**{key: float(value[last - first, option]) for key, value in parts.items()})

    def periods(self) -> Array:
        """(L, L, D) seconds per step of the layers a .. b; infinite where b < a."""
        layers = len(self.load.shapes)
        period_LLD = np.full((layers, layers, len(self.replicas)), np.inf)
        for first in range(layers):
            parts = self._parts(first)
            period_LLD[first, first:] = np.maximum.reduce([parts["work_s"], parts["out_s"], parts["in_s"]])
        return period_LLD

    def _parts(self, first: int) -> dict[str, Array]:
        """The fields of StageSeconds for the ranges that begin with `first`, by last layer and option."""
        layers_s, norms_s = (p[first + 1 :] - p[first] for p in (self._layers, self._norms))
        # The last layer of a stage has no next one to hide behind.
        last_s = self._sum_LD[first:]
        sums_s = norms_s + self._exposed[first:-1] - self._exposed[first] + last_s
        sent = self._sent_L[first:, None] * self._share_D
        copy_s = sent / self.target.bytes_per_s
        link = self.target.link_bytes_per_s
        received = self._sent_L[first - 1] * self._share_D if first else np.zeros_like(self._share_D)
        return {
            "work_s": layers_s + sums_s + copy_s,
            "layers_s": layers_s,
            "sums_s": sums_s,
            "copy_s": copy_s,
            "after_send_s": last_s + self._step_L[first:, None],
            "out_s": sent / link + self._wire[first + 1 :] - self._wire[first],
            "in_s": np.broadcast_to(received / link, layers_s.shape) + self._wire[first + 1 :] - self._wire[first],
        }

    def memory(self) -> Array:
        """(L, L, D) bytes of one worker: weights, gradients, optimizer state, the largest layer's activations and
        the buffers of the links; infinite where the range is empty."""
        load = self.load
        shapes = load.shapes
        learned_L = np.array([learned(s) for s in shapes], dtype=np.float64)
        frozen_L = np.array([s.inner.frozen_parameters if s.inner else 0 for s in shapes]) + [s.buffers for s in shapes]
        held = _prefix((learned_L * (2 + OPTIMIZER_STATE[load.optimizer]) + frozen_L)[:, None])[:, 0]
        kept_L = np.array([_kept(s, load) for s in shapes])
        alone_D = np.array(self.replicas) == 1
        memory_LLD = np.full((len(shapes), len(shapes), len(self.replicas)), np.inf)
        for first in range(len(shapes)):
            received = self._sent_L[first - 1] if first else 0.0
            # With replicas the gradients of one layer are copied together to be summed.
            summed = np.maximum.accumulate(learned_L[first:])[:, None] * ~alone_D
            numbers = (held[first + 1 :] - held[first])[:, None] + summed
            numbers = numbers + np.maximum.accumulate(kept_L[first:])[:, None] * self._share_D
            links = SLOTS * (self._sent_L[first:, None] + received) * self._share_D
            memory_LLD[first, first:] = load.dtype_bytes * numbers + links
        return memory_LLD


def _kept(shape: LayerShape, load: Load) -> float:
    """Numbers that a unit holds for one sample of its share of a batch, on average."""
    kept, parts = kept_numbers(shape, load.num_classes), load.micro_batches
    if parts == 1:
        return kept
    # Of all parts: the input, and the outputs before and after they are put together.
    whole = math.prod(shape.input) + 2 * math.prod(shape.output)
    return whole + (kept - math.prod(shape.input)) / parts


def _prefix(values_LD: Array) -> Array:
    """(L + 1, D) sums of the first 0 .. L rows."""
    return np.vstack([np.zeros((1, values_LD.shape[1])), np.cumsum(values_LD, axis=0)])
