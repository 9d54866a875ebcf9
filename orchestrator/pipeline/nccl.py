"""Links between GPUs: the header of a message goes ahead over gloo, its tensors follow over NCCL.

The header tells the host all that it has to know, and a stream waits for the tensors, so that no host ever waits for a
device. Tensors go one by one, not in a batch: then NCCL has a communicator and a stream for every pair of workers. In
batches there is one for all, and a send would queue behind the receives of messages that are still to come. A tensor is
asked for only when its header says that it is on its way; a receive for a message that never comes would hold up
whoever waits for the whole device.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor

from orchestrator.pipeline.links import LinkShape, Message, Slot, wait_for
from orchestrator.pipeline.mesh import SLOTS

# NCCL knows no tags; on gloo, where tests run this, tensors and headers must not be taken for one another.
_HEADER_TAG = 1


def meet(source: int, target: int, device: torch.device) -> None:
    """Make NCCL's communicator of a link; both ends call this, in the same order for all their links."""
    if dist.get_rank() == source:
        work = dist.isend(torch.zeros(1, device=device), target)
    else:
        work = dist.irecv(torch.zeros(1, device=device), source)
    assert work is not None
    work.wait()


class _End:
    """Buffers of the fixed message size, and what is under way in each: a header, and tensors."""

    def __init__(self, shape: LinkShape, peer: int, timeout_s: float, device: torch.device) -> None:
        self.waited_s = 0.0
        self.bytes_total = 0
        self._peer, self._timeout_s, self._device = peer, timeout_s, device
        memory = [torch.empty(shape.slot_bytes, dtype=torch.uint8, device=device) for _ in range(SLOTS)]
        headers = [torch.empty(shape.sizes[0], dtype=torch.uint8) for _ in range(SLOTS)]
        self._slots = [Slot(shape, *parts) for parts in zip(memory, headers, strict=True)]
        self._headers: list[dist.Work | None] = [None] * SLOTS
        self._tensors: list[list[dist.Work]] = [[] for _ in range(SLOTS)]
        self._next = 0

    def _begin_tensors(self, i: int, operation: Callable[..., dist.Work | None], large: Tensor) -> None:
        """Labels, votes where there are any, and the activation, which is `large`."""
        slot = self._slots[i]
        tensors = [slot.small, slot.votes, large] if slot.has_vote else [slot.small, large]
        works = [operation(tensor, self._peer) for tensor in tensors]
        self._tensors[i] = [work for work in works if work is not None]
        self.bytes_total += slot.header.numel() + sum(tensor.numel() for tensor in tensors)

    def _wait_for_header(self, i: int, awaited: str) -> None:
        """The host waits for the other host. Raises LinkError when that is gone or silent."""
        work, self._headers[i] = self._headers[i], None
        if work is not None:
            self.waited_s += wait_for(work, self._peer, awaited, self._timeout_s)

    def _wait_for_tensors(self, i: int) -> None:
        """What is computed from here on waits for the transfer; the host does not (with a time-out it would)."""
        began = time.perf_counter()
        for work in self._tensors[i]:
            work.wait()
        self._tensors[i] = []
        self.waited_s += time.perf_counter() - began


class NcclSender(_End):
    """The giving end. The activation of a full batch is sent from where it lies."""

    def __init__(self, shape: LinkShape, peer: int, timeout_s: float, device: torch.device) -> None:
        super().__init__(shape, peer, timeout_s, device)
        # What is being sent: memory that is let go could be used again before it has gone.
        self._sent: list[Tensor | None] = [None] * SLOTS

    def send(self, message: Message) -> None:
        i = self._next
        self._wait_for_header(i, "no free buffer")
        self._wait_for_tensors(i)
        slot = self._slots[i]
        direct = slot.as_large(message)
        slot.write(message, large=direct is None)
        large = slot.large if direct is None else direct
        # First the header: NCCL's host side may wait here until the other end asks for the tensors.
        self._headers[i] = dist.isend(slot.header, self._peer, tag=_HEADER_TAG)
        self._begin_tensors(i, dist.isend, large)
        self._sent[i] = large
        self._next = (i + 1) % SLOTS

    def close(self) -> None:
        """Wait until the other end has taken all headers; the tensors follow them."""
        self._timeout_s = min(self._timeout_s, 30.0)
        for i in range(SLOTS):
            self._wait_for_header(i, "no free buffer")
            self._wait_for_tensors(i)


class NcclReceiver(_End):
    """The taking end; the headers of all messages but that in use are asked for ahead."""

    def __init__(self, shape: LinkShape, peer: int, timeout_s: float, device: torch.device) -> None:
        super().__init__(shape, peer, timeout_s, device)
        self._beside: torch.cuda.Stream | None = None
        # For each buffer, when all that reads it has been computed.
        self._read: list[torch.cuda.Event] = []
        if device.type == "cuda":
            self._beside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._read = [torch.cuda.current_stream(device).record_event() for _ in range(SLOTS)]
        for i in range(SLOTS - 1):
            self._ask_for_header(i)

    def _ask_for_header(self, i: int) -> None:
        self._headers[i] = dist.irecv(self._slots[i].header, self._peer, tag=_HEADER_TAG)

    def recv(self) -> Message:
        i, last = self._next, (self._next + SLOTS - 1) % SLOTS
        self._mark_as_read(last)
        self._ask_for_header(last)
        self._wait_for_header(i, "no activation")
        slot = self._slots[i]
        with self._once_read(i):
            self._begin_tensors(i, dist.irecv, slot.large)
        self._wait_for_tensors(i)
        self._next = (i + 1) % SLOTS
        return slot.read()

    def _mark_as_read(self, i: int) -> None:
        if self._beside is not None:
            self._read[i] = torch.cuda.current_stream(self._device).record_event()

    def _once_read(self, i: int) -> AbstractContextManager[object]:
        """What is asked for inside waits until the buffer has been read, not for all that was computed since."""
        if self._beside is None:
            return nullcontext()
        self._beside.wait_event(self._read[i])
        return torch.cuda.stream(self._beside)

    def close(self) -> None:
        """Nothing is under way but the headers of messages that will not come."""
        self._headers = [None] * SLOTS
