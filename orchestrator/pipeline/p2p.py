"""Links over torch.distributed: gloo between CPU workers, NCCL between GPUs. Receives are posted ahead."""

from __future__ import annotations

import time
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
        self._buffers: list[Tensor] = [
            torch.zeros(shape.slot_bytes, dtype=torch.uint8, device=device) for _ in range(SLOTS)
        ]
        self._slots = [Slot(shape, buffer) for buffer in self._buffers]
        self._work: list[dist.Work | None] = [None] * SLOTS
        self._next = 0

    def close(self) -> None:
        self._work = [None] * SLOTS


class P2PSender(_Ring):
    """The giving end. A handle is kept until its transfer is over: gloo loses a message whose handle is dropped."""

    def send(self, message: Message) -> None:
        work = self._work[self._next]
        if work is not None:
            self.waited_s += _wait(work, self._peer, "no free buffer", self._timeout_s)
        self._slots[self._next].write(message)
        operation = dist.P2POp(dist.isend, self._buffers[self._next], self._peer)
        self._work[self._next] = dist.batch_isend_irecv([operation])[0]
        self.bytes_total += self._buffers[self._next].numel()
        self._next = (self._next + 1) % SLOTS

    def close(self) -> None:
        for work in self._work:
            if work is not None and not work.is_completed():
                _wait(work, self._peer, "no free buffer", min(self._timeout_s, 30.0))
        super().close()


class P2PReceiver(_Ring):
    """The taking end; all but the buffer in use are posted for receiving."""

    def __init__(self, shape: LinkShape, peer: int, timeout_s: float, device: torch.device) -> None:
        super().__init__(shape, peer, timeout_s, device)
        for i in range(SLOTS - 1):
            self._post(i)
        self._held: int | None = None

    def _post(self, i: int) -> None:
        operation = dist.P2POp(dist.irecv, self._buffers[i], self._peer)
        self._work[i] = dist.batch_isend_irecv([operation])[0]

    def recv(self) -> Message:
        # The buffer handed out last time is free now; its next message is the one after those under way.
        self._post((self._next + SLOTS - 1) % SLOTS)
        work = self._work[self._next]
        assert work is not None
        self.waited_s += _wait(work, self._peer, "no activation", self._timeout_s)
        message = self._slots[self._next].read()
        self.bytes_total += self._buffers[self._next].numel()
        self._next = (self._next + 1) % SLOTS
        return message
