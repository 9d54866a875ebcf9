"""A ring of slots in shared memory between two processes of one Linux host.

The memory is anonymous (memfd) and passed over an abstract unix socket, which also carries one byte per filled
or freed slot. Nothing has a name in a file system, so nothing is left behind however the processes end, and a
dead neighbour is seen at once as the end of the socket.
"""

from __future__ import annotations

import mmap
import os
import select
import socket
import time

import torch

from orchestrator.pipeline.links import LinkError, LinkShape, Message, Slot
from orchestrator.pipeline.mesh import SLOTS

_CONNECT_PAUSE_S = 0.02
# How long a process asks before it sleeps. Putting it to sleep and waking it costs both sides about as much.
_ASK_S = 1e-4


def _address(token: str, source: int, target: int) -> str:
    return f"\0hff-link-{token}-{source}-{target}"


def listen(token: str, source: int, target: int) -> socket.socket:
    """The receiving end's socket; opened before anybody waits, so that connecting never deadlocks."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(_address(token, source, target))
    listener.listen(1)
    return listener


def _slots(shape: LinkShape, descriptor: int) -> tuple[mmap.mmap, list[Slot]]:
    memory = mmap.mmap(descriptor, SLOTS * shape.slot_bytes)
    flat = torch.frombuffer(memory, dtype=torch.uint8)
    size = shape.slot_bytes
    return memory, [Slot(shape, flat[i * size : (i + 1) * size]) for i in range(SLOTS)]


class _End:
    """What both ends share: the socket, its time-out and the clock of waiting."""

    def __init__(self, peer: int, timeout_s: float) -> None:
        self.waited_s = 0.0
        self.bytes_total = 0
        self._peer, self._timeout_s = peer, timeout_s
        self._socket: socket.socket | None = None

    def _take_token(self, awaited: str) -> None:
        """Wait for one byte from the neighbour. Raises LinkError when it is gone or silent."""
        assert self._socket is not None
        began = time.perf_counter()
        try:
            token = self._ask(self._socket)
        except TimeoutError:
            raise LinkError(
                f"rank {self._peer} gave {awaited} for {self._timeout_s:g} s (cluster.timeout_s); "
                "that worker hangs or is far slower than this one"
            ) from None
        except OSError as error:
            raise LinkError(f"rank {self._peer} is gone while {awaited} was awaited: {error}") from error
        finally:
            self.waited_s += time.perf_counter() - began
        if not token:
            raise LinkError(f"rank {self._peer} is gone: its process ended")

    def _ask(self, end: socket.socket) -> bytes:
        """One byte, none at the end of the connection. Raises TimeoutError."""
        awake_until = time.perf_counter() + _ASK_S
        while True:
            try:
                return end.recv(1)
            except BlockingIOError:
                if time.perf_counter() < awake_until:
                    continue
            poll = select.poll()
            poll.register(end, select.POLLIN)
            if not poll.poll(1000 * self._timeout_s):
                raise TimeoutError

    def _give_token(self) -> None:
        assert self._socket is not None
        try:
            self._socket.sendall(b"\1")
        except OSError as error:
            raise LinkError(f"rank {self._peer} is gone: {error}") from error

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


class ShmSender(_End):
    """The giving end; it makes the memory."""

    def __init__(self, shape: LinkShape, token: str, rank: int, peer: int, timeout_s: float) -> None:
        super().__init__(peer, timeout_s)
        self._socket = self._connect(_address(token, rank, peer))
        self._socket.settimeout(timeout_s)
        descriptor = os.memfd_create("hff-link", os.MFD_CLOEXEC)
        try:
            os.ftruncate(descriptor, SLOTS * shape.slot_bytes)
            self._memory, self._slots = _slots(shape, descriptor)
            socket.send_fds(self._socket, [b"\1"], [descriptor])
            self._socket.setblocking(False)
        finally:
            os.close(descriptor)
        self._next = 0
        self._free = SLOTS

    def _connect(self, address: str) -> socket.socket:
        until = time.monotonic() + self._timeout_s
        while True:
            end = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                end.connect(address)
                return end
            except OSError:
                end.close()
                if time.monotonic() > until:
                    raise LinkError(
                        f"rank {self._peer} did not open its link in {self._timeout_s:g} s (cluster.timeout_s)"
                    ) from None
                time.sleep(_CONNECT_PAUSE_S)

    def send(self, message: Message) -> None:
        if self._free == 0:
            self._take_token("no free slot")
            self._free += 1
        self.bytes_total += self._slots[self._next].write(message)
        self._give_token()
        self._next = (self._next + 1) % SLOTS
        self._free -= 1


class ShmReceiver(_End):
    """The taking end; messages are views of the ring, valid until the next call."""

    def __init__(self, shape: LinkShape, listener: socket.socket, peer: int, timeout_s: float) -> None:
        super().__init__(peer, timeout_s)
        listener.settimeout(timeout_s)
        try:
            self._socket, _ = listener.accept()
            self._socket.settimeout(timeout_s)
            _, descriptors, _, _ = socket.recv_fds(self._socket, 1, 1)
            self._socket.setblocking(False)
        except TimeoutError:
            raise LinkError(f"rank {peer} did not connect in {timeout_s:g} s (cluster.timeout_s)") from None
        finally:
            listener.close()
        if not descriptors:
            raise LinkError(f"rank {peer} is gone: its process ended before it sent anything")
        try:
            self._memory, self._slots = _slots(shape, descriptors[0])
        finally:
            os.close(descriptors[0])
        self._next = 0
        self._held = False

    def recv(self) -> Message:
        if self._held:
            self._give_token()
        self._held = False
        self._take_token("no activation")
        message = self._slots[self._next].read()
        self.bytes_total += message.activation.numel() * message.activation.element_size()
        self._next = (self._next + 1) % SLOTS
        self._held = True
        return message
