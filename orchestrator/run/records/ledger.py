"""Which samples a run has consumed, in which order: the proof behind `order_sha256`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any


def chain(digest: str, keys: Iterable[str]) -> str:
    """Extend a chained hash by keys in order of consumption."""
    value = bytes.fromhex(digest)
    for key in keys:
        value = hashlib.sha256(value + key.encode()).digest()
    return value.hex()


_START = hashlib.sha256(b"").hexdigest()


class Ledger:
    """Keys consumed so far; lives on rank 0.

    The chain covers every key since the first step, also over interruptions. The keys of the running epoch
    are kept until it ends, to hash them sorted.
    """

    def __init__(self) -> None:
        self.order = _START
        self.epochs: list[str] = []
        self.epoch_start = _START
        self.keys: list[str] = []
        self.skipped: list[str] = []
        self.skipped_before = 0

    def consume(self, keys: Sequence[str], skipped: Sequence[str] = ()) -> None:
        self.order = chain(self.order, keys)
        self.keys.extend(keys)
        self.skipped.extend(skipped)

    def end_epoch(self) -> None:
        self.epochs.append(hashlib.sha256("\n".join(sorted(self.keys)).encode()).hexdigest())
        self.skipped_before += len(self.skipped)
        self.keys, self.skipped, self.epoch_start = [], [], self.order

    @property
    def skipped_samples(self) -> int:
        return self.skipped_before + len(self.skipped)

    def state(self) -> dict[str, Any]:
        return {
            "order_sha256": self.order,
            "epoch_start_sha256": self.epoch_start,
            "sample_keys_sha256": list(self.epochs),
            "epoch_samples": len(self.keys),
            "epoch_skipped": list(self.skipped),
            "skipped_before": self.skipped_before,
        }

    @classmethod
    def restored(cls, state: dict[str, Any], epoch_keys: Callable[[int], Sequence[str]]) -> Ledger:
        """Rebuild the ledger of an interrupted run.

        `epoch_keys(n)` gives the first n keys of the interrupted epoch in the order of the plan. Hashed on
        top of the epoch's start they must give the stored chain, which proves that exactly these were
        consumed. Raises ValueError when they do not.
        """
        ledger = cls()
        ledger.order = state["order_sha256"]
        ledger.epochs = list(state["sample_keys_sha256"])
        ledger.epoch_start = state["epoch_start_sha256"]
        ledger.skipped = list(state["epoch_skipped"])
        ledger.skipped_before = int(state["skipped_before"])
        left_out = set(ledger.skipped)
        # Of a repeated batch, a key may have been left out several times.
        planned = epoch_keys(int(state["epoch_samples"]) + len(ledger.skipped))
        ledger.keys = [key for key in planned if key not in left_out]
        if chain(ledger.epoch_start, ledger.keys) != ledger.order:
            raise ValueError("the order of the samples is not the one that the checkpoint was made with")
        return ledger
