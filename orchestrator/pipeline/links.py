"""One-way links between stages: what travels, and how it lies in a buffer.

A message lies in a slot of fixed size: a header, labels, votes, activation. The receiver slices to the valid
count before anything is computed.
"""

from __future__ import annotations

import ctypes
import math
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from orchestrator.errors import OrchestratorError

Kind = Literal["train", "eval"]
_HEADER = struct.Struct("<qiiiiiiiiid")
_ALIGNMENT = 64


class LinkError(OrchestratorError):
    """A neighbour that is gone or silent; usually a consequence of what happened there."""


@dataclass(frozen=True)
class Message:
    """A batch between two stages: `activation` (valid, ...), `target` (valid,) int64, `vote` (valid, C) or None.

    `last` ends an evaluation; `stop` marks the last training step before everybody saves and leaves. `count` is the
    number of valid samples of the whole batch, over all replicas. Of mixed images `partner` (valid,) int64 are the
    other labels, and `partner_weight` is their share.
    """

    step: int
    kind: Kind
    last: bool
    stop: bool
    activation: Tensor
    target: Tensor
    vote: Tensor | None = None
    count: int = 0
    partner: Tensor | None = None
    partner_weight: float = 0.0


@dataclass(frozen=True)
class LinkShape:
    """What one link carries at most. Both ends derive it from the plan, so it is never negotiated.

    `labels` is 2 where samples may be mixed. Activations of `dtype` travel as `wire`, rounded to it, where it is given.
    """

    activation: tuple[int, ...]
    dtype: torch.dtype
    max_batch: int
    num_classes: int
    memory_format: Literal["contiguous", "channels_last"] = "contiguous"
    labels: int = 1
    wire: torch.dtype | None = None

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Bytes of header, labels, votes and activation, each padded to a cache line."""
        item = (self.wire or self.dtype).itemsize
        parts = (
            _HEADER.size,
            8 * self.max_batch * self.labels,
            4 * self.max_batch * self.num_classes,
            item * self.max_batch * math.prod(self.activation),
        )
        header, labels, votes, activation = (-(-p // _ALIGNMENT) * _ALIGNMENT for p in parts)
        return header, labels, votes, activation

    @property
    def slot_bytes(self) -> int:
        return sum(self.sizes)


class Sender(Protocol):
    """The end that gives."""

    @property
    def waited_s(self) -> float:
        """Seconds spent waiting for a free slot."""

    @property
    def bytes_total(self) -> int: ...

    def send(self, message: Message) -> None:
        """Copy into a free slot and return; waits only while all slots are full."""

    def close(self) -> None: ...


class Receiver(Protocol):
    """The end that takes."""

    @property
    def waited_s(self) -> float:
        """Seconds spent waiting for a message."""

    @property
    def bytes_total(self) -> int: ...

    def recv(self) -> Message:
        """The next message, whose transfer was already under way. Valid until the next call."""

    def close(self) -> None: ...


def wait_for(work: dist.Work, peer: int, awaited: str, timeout_s: float) -> float:
    """Wait for a transfer of a host; returns the seconds. Raises LinkError when the neighbour is gone or silent."""
    began = time.perf_counter()
    try:
        work.wait(timedelta(seconds=timeout_s))
    except RuntimeError as error:
        first_line = str(error).splitlines()[0]
        raise LinkError(f"rank {peer} gave {awaited} (cluster.timeout_s {timeout_s:g}): {first_line}") from error
    return time.perf_counter() - began


class Slot:
    """Views of one slot's memory, a flat uint8 tensor: the layout of a message lives here alone.

    Memory of a GPU has its `header` apart, in that of the host, which reads and writes it.
    """

    def __init__(self, shape: LinkShape, memory: Tensor, header_apart: Tensor | None = None) -> None:
        header, labels, votes, activation = shape.sizes
        ends = [header, header + labels, header + labels + votes, header + labels + votes + activation]
        self._shape = shape
        self.header = memory[:header] if header_apart is None else header_apart
        # As bytes: at steps of 2 ms tensors would be noticed here.
        self._header = self.header.numpy().data
        self._views: dict[tuple[int, ...], Tensor] = {}
        self._labels = memory[header : ends[1]].view(torch.int64)
        self._partners = self._labels[shape.max_batch :]
        self._votes = memory[ends[1] : ends[2]].view(torch.float32)
        self._activation = memory[ends[2] : ends[3]].view(shape.wire or shape.dtype)
        # The parts of the memory that travel: all that is small, and the activation of a full batch. Where the header
        # goes ahead it says whether there are votes.
        self.small = memory[: ends[2]] if header_apart is None else memory[header : ends[1]]
        self.votes = memory[ends[1] : ends[2]]
        self.large = memory[ends[2] : ends[2] + self._activation_view(shape.max_batch, shape.activation).nbytes]

    def _activation_view(self, valid: int, shape: Sequence[int]) -> Tensor:
        """(valid, *shape) in the agreed memory format, over the dense beginning of the slot."""
        key = (valid, *shape)
        if key not in self._views:
            self._views[key] = self._new_view(valid, shape)
        return self._views[key]

    def _new_view(self, valid: int, shape: Sequence[int]) -> Tensor:
        flat = self._activation[: valid * math.prod(shape)]
        if self._shape.memory_format == "channels_last" and len(shape) == 3:
            channels, height, width = shape
            return flat.view(valid, height, width, channels).permute(0, 3, 1, 2)
        return flat.view(valid, *shape)

    def as_large(self, message: Message) -> Tensor | None:
        """The activation of a message as the bytes of `large`, without a copy; None where there must be one."""
        view, activation = self._activation_view(self._shape.max_batch, self._shape.activation), message.activation
        same = (view.shape, view.dtype, view.device) == (activation.shape, activation.dtype, activation.device)
        order = sorted(range(view.dim()), key=view.stride, reverse=True)
        dense = activation.permute(order) if same else activation
        return dense.reshape(-1).view(torch.uint8) if same and dense.is_contiguous() else None

    def write(self, message: Message, *, large: bool = True) -> int:
        """Fill the slot, without `large` all but the activation; returns the bytes that carry something."""
        valid = len(message.target)
        if valid > self._shape.max_batch:
            raise ValueError(f"a batch of {valid} does not fit a link for {self._shape.max_batch}")
        has = (int(message.vote is not None), int(message.partner is not None))
        flags = (int(message.last), int(message.stop), *has, message.count)
        shape = tuple(message.activation.shape[1:])
        # The sides of a map, which may be smaller than the agreed ones; 0 for anything else.
        sides = shape[1:] if len(shape) == 3 else (0, 0)
        packed = _HEADER.pack(message.step, int(message.kind == "eval"), valid, *flags, *sides, message.partner_weight)
        self._header[: len(packed)] = packed
        self._labels[:valid].copy_(message.target)
        if message.partner is not None:
            self._partners[:valid].copy_(message.partner)
        if message.vote is not None:
            classes = self._shape.num_classes
            self._votes[: valid * classes].view(valid, classes).copy_(message.vote)
        view = self._activation_view(valid, shape)
        if large:
            _copy(message.activation, view)
        return view.numel() * view.element_size() + 8 * valid + len(packed)

    @property
    def has_vote(self) -> bool:
        """What the header says of votes."""
        return bool(_HEADER.unpack_from(self._header)[5])

    def read(self) -> Message:
        """Views of what the slot holds; an activation that was rounded on its way is a new tensor."""
        header = _HEADER.unpack_from(self._header)
        step, is_eval, valid, last, stop, has_vote, has_partner, count, *sides, weight = header
        classes, shape = self._shape.num_classes, self._shape.activation
        return Message(
            step=step,
            kind="eval" if is_eval else "train",
            last=bool(last),
            stop=bool(stop),
            activation=self._activation_view(valid, (shape[0], *sides) if any(sides) else shape).to(self._shape.dtype),
            target=self._labels[:valid],
            vote=self._votes[: valid * classes].view(valid, classes) if has_vote else None,
            count=count,
            partner=self._partners[:valid] if has_partner else None,
            partner_weight=weight,
        )


def _copy(source: Tensor, target: Tensor) -> None:
    """Copy into a tensor that is dense; on the CPU, of one that lies alike the bytes, in half of torch's time."""
    on_cpu = target.device.type == source.device.type == "cpu"
    alike = (source.dtype, source.shape, source.stride()) == (target.dtype, target.shape, target.stride())
    if on_cpu and alike:
        ctypes.memmove(target.data_ptr(), source.data_ptr(), target.nbytes)
    else:
        target.copy_(source)
