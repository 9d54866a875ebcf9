"""Bytes of activations that a process holds: what autograd keeps for backward, and buffers on their way."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor


class Held:
    """Largest sum of distinct storages held at any time inside `with`; those of `ignored` tensors do not count."""

    def __init__(self, ignored: Iterable[Tensor] = ()) -> None:
        self._ignored = {tensor.untyped_storage().data_ptr() for tensor in ignored}
        self._holders: dict[int, list[int]] = {}
        self._now = 0
        self.peak_bytes = 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: _Kept(self, t), lambda kept: kept.tensor)

    def __enter__(self) -> Held:
        self._hooks.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._hooks.__exit__(*exc)

    def buffer(self, tensor: Tensor) -> None:
        """Count a buffer of a transport for as long as this tensor object lives."""
        weakref.finalize(tensor, self.release, self.take(tensor)).atexit = False

    def take(self, tensor: Tensor) -> int:
        """One more holder of a tensor's storage; returns the address to release."""
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address not in self._ignored:
            entry = self._holders.setdefault(address, [0, storage.nbytes()])
            self._now += entry[1] if entry[0] == 0 else 0
            entry[0] += 1
            self.peak_bytes = max(self.peak_bytes, self._now)
        return address

    def release(self, address: int) -> None:
        entry = self._holders.get(address)
        if entry is not None:
            entry[0] -= 1
            if entry[0] == 0:
                self._now -= entry[1]
                del self._holders[address]


class _Kept:
    """Lives as long as autograd needs the tensor."""

    def __init__(self, held: Held, tensor: Tensor) -> None:
        self.tensor, self._held = tensor, held
        self._address = held.take(tensor)

    def __del__(self) -> None:
        self._held.release(self._address)
