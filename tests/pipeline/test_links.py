"""Links between real threads and processes: same bits, bounded memory, and a neighbour's end is noticed."""

from __future__ import annotations

import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from orchestrator.pipeline import shm
from orchestrator.pipeline.connect import open_links
from orchestrator.pipeline.links import LinkError, LinkShape, Message
from orchestrator.pipeline.mesh import SLOTS, Mesh
from tests.pipeline.ranks import run_ranks, start_process

SHAPE = LinkShape((4, 3, 2), torch.float32, max_batch=5, num_classes=7)
Pair = tuple[shm.ShmSender, shm.ShmReceiver]


def connect(shape: LinkShape, timeout_s: float = 20.0) -> Pair:
    """Both ends in this process: the connection needs a thread on one side."""
    token = uuid.uuid4().hex
    listener = shm.listen(token, 0, 1)
    made: list[shm.ShmReceiver] = []
    thread = threading.Thread(target=lambda: made.append(shm.ShmReceiver(shape, listener, 0, timeout_s)))
    thread.start()
    sender = shm.ShmSender(shape, token, 0, 1, timeout_s)
    thread.join()
    return sender, made[0]


@pytest.fixture
def pair() -> Iterator[Callable[..., Pair]]:
    opened: list[Any] = []

    def make(shape: LinkShape = SHAPE, timeout_s: float = 20.0) -> Pair:
        ends = connect(shape, timeout_s)
        opened.extend(ends)
        return ends

    yield make
    for end in opened:
        end.close()


def message(step: int, valid: int, shape: LinkShape = SHAPE, **flags: Any) -> Message:
    generator = torch.Generator().manual_seed(step)
    activation = torch.randn(valid, *shape.activation, generator=generator).to(shape.dtype)
    if shape.memory_format == "channels_last":
        activation = activation.contiguous(memory_format=torch.channels_last)
    vote = torch.randn(valid, shape.num_classes, generator=generator) if flags.pop("vote", False) else None
    target = torch.randint(7, (valid,), generator=generator)
    partner = torch.randint(7, (valid,), generator=generator) if shape.labels == 2 else None
    defaults = {"kind": "train", "last": False, "stop": False, "partner_weight": 0.25 if partner is not None else 0.0}
    return Message(step, **{**defaults, **flags}, activation=activation, target=target, vote=vote, partner=partner)


def assert_same(got: Message, sent: Message) -> None:
    assert (got.step, got.kind, got.last, got.stop) == (sent.step, sent.kind, sent.last, sent.stop)
    assert torch.equal(got.activation, sent.activation)
    assert got.activation.stride() == sent.activation.stride() or got.activation.numel() == 0
    assert torch.equal(got.target, sent.target)
    assert (got.partner is None) == (sent.partner is None)
    if sent.partner is not None:
        assert got.partner is not None
        assert torch.equal(got.partner, sent.partner)
    assert got.partner_weight == sent.partner_weight
    assert (got.vote is None) == (sent.vote is None)
    if sent.vote is not None:
        assert got.vote is not None
        assert torch.equal(got.vote, sent.vote)


def test_labels_of_mixed_samples_travel_with_their_weight(pair: Callable[..., Pair]) -> None:
    shape = replace(SHAPE, labels=2)
    sender, receiver = pair(shape)
    for step, valid in enumerate((5, 3, 0)):
        sent = message(step, valid, shape, vote=step == 1)
        sender.send(sent)
        assert_same(receiver.recv(), sent)
    plain = message(9, 4)
    sender.send(plain)
    assert_same(receiver.recv(), plain)


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_maps_may_be_smaller_than_the_link_was_made_for(pair: Callable[..., Pair], memory_format: Any) -> None:
    shape = replace(SHAPE, memory_format=memory_format)
    sender, receiver = pair(shape)
    for step, sides in enumerate(((2, 2), (3, 2), (2, 2))):
        sent = message(step, 3, replace(shape, activation=(4, *sides)))
        sender.send(sent)
        assert_same(receiver.recv(), sent)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_messages_arrive_in_order_with_the_same_bits_and_strides(
    pair: Callable[..., Pair], dtype: torch.dtype, memory_format: Any
) -> None:
    shape = LinkShape((4, 3, 2), dtype, 5, 7, memory_format)
    sender, receiver = pair(shape)
    sent = [
        message(0, 5, shape),
        message(1, 2, shape, vote=True, kind="eval", last=True),
        message(2, 0, shape),
        message(3, 5, shape, stop=True),
        message(4, 1, shape),
    ]
    for one in sent:
        sender.send(one)
        assert_same(receiver.recv(), one)


def test_a_sender_runs_ahead_until_the_ring_is_full_and_then_waits(pair: Callable[..., Pair]) -> None:
    sender, receiver = pair(timeout_s=0.3)
    for step in range(SLOTS):
        sender.send(message(step, 5))
    with pytest.raises(LinkError, match=r"rank 1 gave no free slot for 0.3 s \(cluster.timeout_s\)"):
        sender.send(message(SLOTS, 5))
    assert sender.waited_s >= 0.3
    receiver.recv()
    receiver.recv()  # gives the first slot back
    sender.send(message(SLOTS, 5))
    assert [receiver.recv().step for _ in range(SLOTS - 1)] == list(range(2, SLOTS + 1))


def test_a_silent_neighbour_ends_in_an_error_that_names_it(pair: Callable[..., Pair]) -> None:
    _, receiver = pair(timeout_s=0.2)
    with pytest.raises(LinkError, match=r"rank 0 gave no activation for 0\.2 s"):
        receiver.recv()


def test_a_batch_too_large_for_the_link_is_refused(pair: Callable[..., Pair]) -> None:
    sender, _ = pair()
    with pytest.raises(ValueError, match="a batch of 6 does not fit a link for 5"):
        sender.send(message(0, 6))


def shared_memory() -> set[Path]:
    """What has a name there, but for semaphores, which are other programs'."""
    return {path for path in Path("/dev/shm").iterdir() if not path.name.startswith("sem.")}


def _send_and_sleep(token: str) -> None:
    sender = shm.ShmSender(SHAPE, token, 0, 1, 20.0)
    sender.send(message(0, 5))
    time.sleep(60)


def test_a_killed_neighbour_is_noticed_at_once_and_leaves_nothing_behind() -> None:
    before = shared_memory()
    token = uuid.uuid4().hex
    listener = shm.listen(token, 0, 1)
    child = start_process(_send_and_sleep, token)
    receiver = shm.ShmReceiver(SHAPE, listener, 0, 60.0)
    assert_same(receiver.recv(), message(0, 5))
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(LinkError, match="rank 0 is gone"):
        receiver.recv()
    assert time.monotonic() - began < 2
    child.join()
    receiver.close()
    assert shared_memory() <= before


def _over(rank: int, transport: str) -> None:
    incoming, outgoing = (SHAPE, None) if rank else (None, SHAPE)
    receiver, sender = open_links(
        Mesh((1, 1)), rank, incoming, outgoing, transport=transport, timeout_s=20.0, token="t", group=None
    )
    for step in range(8):
        expected = message(step, 5 if step % 3 else 2, vote=step == 4, stop=step == 7)
        if sender is not None:
            sender.send(expected)
        elif receiver is not None:
            assert_same(receiver.recv(), expected)
    for link in (sender, receiver):
        if link is not None:
            link.close()


@pytest.mark.parametrize("transport", ["gloo", "nccl"])
def test_messages_cross_gloo_and_what_nccl_does_with_the_same_bits(transport: str) -> None:
    """Without GPUs the link for NCCL sends its tensors over gloo too: its order of things is the same."""
    run_ranks(2, _over, transport)


ROUNDED_MESSAGES = 8


def _rounded(rank: int, transport: str, memory_format: Any, wire: torch.dtype | None) -> int:
    """Full batches and parts of one through a link for `wire`; returns the bytes that this end has counted."""
    shape = LinkShape((4, 3, 2), torch.float32, 5, 7, memory_format, wire=wire)
    ends = (shape, None) if rank else (None, shape)
    receiver, sender = open_links(Mesh((1, 1)), rank, *ends, transport=transport, timeout_s=20.0, token=f"{wire}")
    for step in range(ROUNDED_MESSAGES):
        sent = message(step, 5 if step % 3 else 2, replace(shape, wire=None), vote=step == 4)
        if sender is not None:
            sender.send(sent)
        elif receiver is not None:
            expected = sent.activation
            if wire is not None and transport != "shm":
                expected = expected.bfloat16().float()
                assert not torch.equal(expected, sent.activation)
            assert_same(receiver.recv(), replace(sent, activation=expected))
    dist.barrier()  # who closes a link first takes what lies in it along
    end = sender or receiver
    assert end is not None
    end.close()
    return end.bytes_total


@pytest.mark.parametrize(("transport", "memory_format"), [("gloo", "contiguous"), ("nccl", "channels_last")])
def test_a_link_of_bfloat16_rounds_activations_alone_and_sends_half_their_bytes(
    transport: str, memory_format: Any
) -> None:
    exact = run_ranks(2, _rounded, transport, memory_format, None)
    rounded = run_ranks(2, _rounded, transport, memory_format, torch.bfloat16)
    full_batch = 5 * 4 * 3 * 2
    assert [a - b for a, b in zip(exact, rounded, strict=True)] == [ROUNDED_MESSAGES * full_batch * (4 - 2)] * 2
    if transport == "nccl":
        header, labels, votes, _ = SHAPE.sizes
        activations = ROUNDED_MESSAGES * 4 * full_batch
        assert exact == [ROUNDED_MESSAGES * (header + labels) + votes + activations] * 2, "votes went once"


def test_shared_memory_rounds_nothing() -> None:
    exact = run_ranks(2, _rounded, "shm", "channels_last", None)
    assert run_ranks(2, _rounded, "shm", "channels_last", torch.bfloat16) == exact
