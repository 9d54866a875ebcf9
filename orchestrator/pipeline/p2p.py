"""Links over gloo, between hosts: isend and irecv from and into memory of the host. Receives are posted ahead."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from orchestrator.pipeline.links import LinkShape, Message, Slot, wait_for
from orchestrator.pipeline.mesh import SLOTS


class _Ring:
    """Buffers of the fixed message size and the transfers that use them."""

    def __init__(self, shape: LinkShape, peer: int, timeout_s: float) -> None:
        self.waited_s = 0.0
        self.bytes_total = 0
        self._peer, self._timeout_s = peer, timeout_s
        self._slots = [Slot(shape, torch.empty(shape.slot_bytes, dtype=torch.uint8)) for _ in range(SLOTS)]
        self._work: list[list[dist.Work]] = [[] for _ in range(SLOTS)]
        self._next = 0

    def _begin(self, slot: int, operation: Callable[..., dist.Work | None], *parts: Tensor) -> None:
        operations = [dist.P2POp(operation, part, self._peer) for part in parts]
        self._work[slot] = dist.batch_isend_irecv(operations)

    def _end(self, slot: int, awaited: str) -> None:
        for work in self._work[slot]:
            self.waited_s += wait_for(work, self._peer, awaited, self._timeout_s)

    def close(self) -> None:
        self._work = [[] for _ in range(SLOTS)]


class P2PSender(_Ring):
    """The giving end. A handle is kept until its transfer is over: gloo loses a message whose handle is dropped.

    The activation of a full batch is sent from where it lies.
    """

    def __init__(self, shape: LinkShape, peer: int, timeout_s: float) -> None:
        super().__init__(shape, peer, timeout_s)
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
                    wait_for(work, self._peer, "no free buffer", min(self._timeout_s, 30.0))
        super().close()


class P2PReceiver(_Ring):
    """The taking end; all but the buffer in use are posted for receiving."""

    def __init__(self, shape: LinkShape, peer: int, timeout_s: float) -> None:
        super().__init__(shape, peer, timeout_s)
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
