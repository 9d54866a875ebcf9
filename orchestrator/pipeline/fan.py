"""Links of a worker to several replicas of the stage before or behind it: a batch is cut and put together again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from orchestrator.pipeline.links import Message, Receiver, Sender
from orchestrator.pipeline.mesh import cuts


class FanOut:
    """One sender for several: every message is cut along its samples, in order of the receiving replicas."""

    def __init__(self, senders: Sequence[Sender], replica: int, replicas: int, others: int) -> None:
        self._senders = senders
        self._place = (replica, replicas, others)

    @property
    def waited_s(self) -> float:
        return sum(sender.waited_s for sender in self._senders)

    @property
    def bytes_total(self) -> int:
        return sum(sender.bytes_total for sender in self._senders)

    def send(self, message: Message) -> None:
        """Send every neighbour its part, which may be empty."""
        borders = cuts(len(message.target), *self._place)
        for sender, start, stop in zip(self._senders, borders, borders[1:], strict=False):
            part = replace(
                message,
                activation=message.activation[start:stop],
                target=message.target[start:stop],
                vote=None if message.vote is None else message.vote[start:stop],
                partner=None if message.partner is None else message.partner[start:stop],
            )
            sender.send(part)

    def close(self) -> None:
        for sender in self._senders:
            sender.close()


class FanIn:
    """One receiver for several: the parts of a batch in order of the sending replicas."""

    def __init__(self, receivers: Sequence[Receiver]) -> None:
        self._receivers = receivers

    @property
    def waited_s(self) -> float:
        return sum(receiver.waited_s for receiver in self._receivers)

    @property
    def bytes_total(self) -> int:
        return sum(receiver.bytes_total for receiver in self._receivers)

    def recv(self) -> Message:
        """The next message of all neighbours as one; its memory is its own."""
        parts = [receiver.recv() for receiver in self._receivers]
        first = parts[0]
        assert all((p.step, p.kind) == (first.step, first.kind) for p in parts), "neighbours are not in step"
        votes = [p.vote for p in parts if p.vote is not None]
        partners = [p.partner for p in parts if p.partner is not None]
        return replace(
            first,
            activation=_joined([p.activation for p in parts]),
            target=torch.cat([p.target for p in parts]),
            vote=torch.cat(votes) if votes else None,
            partner=torch.cat(partners) if partners else None,
            stop=any(p.stop for p in parts),
        )

    def close(self) -> None:
        for receiver in self._receivers:
            receiver.close()


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Along the samples, in the memory format of the parts, which an empty one does not tell."""
    joined = torch.cat([part for part in parts if len(part)] or list(parts))
    if joined.dim() == 4 and parts[0].stride(1) == 1 and joined.shape[1] > 1:
        return joined.contiguous(memory_format=torch.channels_last)
    return joined
