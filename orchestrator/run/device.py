"""How a worker computes: threads, determinism, memory, compiled layers."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hff.layers import LocalLayer
from orchestrator.errors import JobError


def prepare_torch(cluster: dict[str, Any], device: torch.device) -> None:
    """Threads and determinism: the same bits for the same job on the same kind of machine."""
    if device.type == "cpu":
        keep_freed_memory()
        torch.set_num_threads(cluster["threads_per_worker"])
    else:
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True


class ToDevice:
    """Copies batches to a device: those in pinned memory to a GPU on a stream of its own, beside what is computed."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, batch: Tensor) -> Tensor:
        """`batch` on the device; what is computed from here on waits for it, the host does not."""
        if self._stream is None:
            return batch.to(self.device)
        with torch.cuda.stream(self._stream):
            copied = batch.to(self.device, non_blocking=True)
        computing = torch.cuda.current_stream(self.device)
        computing.wait_stream(self._stream)
        # Its memory belongs to the copying stream, which must not use it again while it is computed with.
        copied.record_stream(computing)
        return copied


# Of one body: training, evaluation, a ragged last batch of each, small images first.
_FORMS = 8


def compile_layers(layers: Sequence[LocalLayer]) -> None:
    """Let torch.compile make code of each body at its first use. Raises JobError without a compiler."""
    names = [os.environ.get("CXX", "g++"), "clang++", "c++"]
    if not any(shutil.which(name) for name in names):
        raise JobError(f"train.compile: needs a C++ compiler on every worker ({', '.join(names)}), found none")
    from torch._dynamo import config

    # All bodies share the code of Module.__call__, whose compiled forms torch counts together: beyond its limit of 8
    # a body would run as it is, with no more than a warning.
    config.recompile_limit = max(config.recompile_limit, _FORMS * len(layers))
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 4 * _FORMS * len(layers))
    for layer in layers:
        layer.body.compile()


def keep_freed_memory() -> None:
    """Let glibc's allocator give no memory back to the system, and take none of it by mmap.

    Activations have the same sizes in every step. By default each large one is new memory every time, whose pages
    the system has to find and zero at first touch: a sixth of a step of convolutions. Does nothing without glibc.
    """
    trim_threshold, mmap_max = -1, -4
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(mmap_max, 0)
        library.mallopt(trim_threshold, 2**31 - 1)
