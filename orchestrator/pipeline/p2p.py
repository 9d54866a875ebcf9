"""Links over torch.distributed: gloo between CPU workers, NCCL between GPUs. Receives are posted ahead."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from orchestrator.pipeline.links import LinkError, LinkShape, Message, Slot
from orchestrator.pipeline.mesh import SLOTS


def _wait(work: dist.Work, peer: int, awaited: str, timeout_s: float) -> float:
    """Wait for a transfer; returns the seconds. Raises LinkError when the neighbour is gone or silent."""
    began = time.perf_counter()
    try:
        work.wait(timedelta(seconds=timeout_s))
    except RuntimeError as error:
        first_line = str(error).splitlines()[0]
        raise LinkError(f"rank {peer} gave {awaited} (cluster.timeout_s {timeout_s:g}): {first_line}") from error
    return time.perf_counter() - began


class _Ring:
    """Buffers of the fixed message size and the transfers that use them."""

    def __init__(self, shape: LinkShape, peer: int, timeout_s: float, device: torch.device) -> None:
        self.waited_s = 0.0
        self.bytes_total = 0
        self._peer, self._timeout_s = peer, timeout_s
        self._slots = [
            Slot(shape, torch.empty(shape.slot_bytes, dtype=torch.uint8, device=device)) for _ in range(SLOTS)
        ]
        self._work: list[list[dist.Work]] = [[] for _ in range(SLOTS)]
        self._next = 0

    def _begin(self, slot: int, operation: Callable[..., dist.Work | None], *parts: Tensor) -> None:
        operations = [dist.P2POp(operation, part, self._peer) for part in parts]
        self._work[slot] = dist.batch_isend_irecv(operations)

    def _end(self, slot: int, awaited: str) -> None:
        for work in self._work[slot]:
            self.waited_s += _wait(work, self._peer, awaited, self._timeout_s)

    def close(self) -> None:
        self._work = [[] for _ in range(SLOTS)]


class P2PSender(_Ring):
    """The giving end. A handle is kept until its transfer is over: gloo loses a message whose handle is dropped.

    The activation of a full batch is sent from where it lies.
    """

    def __init__(self, shape: LinkShape, peer: int, timeout_s: float, device: torch.device) -> None:
        super().__init__(shape, peer, timeout_s, device)
        self._sent: list[Tensor | None] = [None] * SLOTS

    def send(self, message: Message) -> None:
        self._end(self._next, "no free buffer")
        slot = self._slots[self._next]
        direct = slot.as_large(message)
        slot.write(message, large=direct is None)
        large = slot.large if direct is None else direct
        self._begin(self._next, dist.isend, slot.small, large)
        self._sent[self._next] = large  # its memory must not be used again before it has gone
        self.bytes_total += slot.small.numel() + large.numel()
        self._next = (self._next + 1) % SLOTS

    def close(self) -> None:
        for works in self._work:
            for work in works:
                if not work.is_completed():
                    _wait(work, self._peer, "no free buffer", min(self._timeout_s, 30.0))
        super().close()


class P2PReceiver(_Ring):
    """The taking end; all but the buffer in use are posted for receiving."""

    def __init__(self, shape: LinkShape, peer: int, timeout_s: float, device: torch.device) -> None:
        super().__init__(shape, peer, timeout_s, device)
        for i in range(SLOTS - 1):
            self._post(i)

    def _post(self, i: int) -> None:
        self._begin(i, dist.irecv, self._slots[i].small, self._slots[i].large)

    def recv(self) -> Message:
        # The buffer handed out last time is free now; its next message is the one after those under way.
        self._post((self._next + SLOTS - 1) % SLOTS)
        self._end(self._next, "no activation")
        slot = self._slots[self._next]
        self.bytes_total += slot.small.numel() + slot.large.numel()
        self._next = (self._next + 1) % SLOTS
        return slot.read()
