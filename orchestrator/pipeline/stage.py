"""The layers that one worker owns, one training step of them and one evaluation batch of them.

A step reads: take the activation that was already being received; for each layer forward, local loss and
gradient; send the last output before that layer's update; update.

Shape letters: B samples of this replica, C classes.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from hff.averages import WeightAverage
from hff.layers import LocalLayer
from hff.local import local_forward_backward, local_update
from hff.objectives import PrototypeHead
from hff.randomness import derive_seed, seed_noise
from orchestrator.pipeline.gather import take_waited
from orchestrator.pipeline.links import Kind, Message, Receiver, Sender
from orchestrator.pipeline.trace import BESIDE, Trace


class NonFiniteLoss(ArithmeticError):
    """The loss of layer `layer` at step `step` is NaN or infinite; its update has not been made."""

    def __init__(self, layer: int, step: int) -> None:
        super().__init__(f"the loss of layer {layer} is not finite at step {step}")
        self.layer, self.step = layer, step


@dataclass(frozen=True)
class StageInput:
    """One batch as a stage sees it: `x` (B, ...) on the device, `target` (B,) int64, `vote` (B, C) or None.

    `count`, the samples of all replicas together, comes with what the stage before sends. `partner` (B,) int64 are the
    other labels of mixed images, with the weight `partner_weight` in the loss.
    """

    step: int
    x: Tensor
    target: Tensor
    vote: Tensor | None = None
    last: bool = False
    stop: bool = False
    count: int = 0
    partner: Tensor | None = None
    partner_weight: float = 0.0


@dataclass
class LayerTotals:
    """Sums over the samples of one replica since the last reading; they stay on the device until read."""

    loss: Tensor
    correct: Tensor
    samples: int = 0
    # Of this process: on a GPU what it takes to give the device its work.
    seconds: float = 0.0


@dataclass
class StageTimes:
    """Seconds of this worker since the last reading."""

    wall_s: float = 0.0
    wait_input_s: float = 0.0
    wait_output_s: float = 0.0
    wait_replicas_s: float = 0.0


@dataclass(frozen=True)
class _Sum:
    """Gradients of a layer (by its place in the stage) on their way over all replicas."""

    layer: int
    gradients: list[Tensor]
    flat: Tensor
    work: dist.Work
    began_ns: int


@dataclass
class Stage:
    """Layers `first` .. of a network with their optimizers and the links to both neighbours.

    `learning_rate(step, layer)` gives the rate of a layer by its global index, `trained(step)` the index of the
    only layer that trains at that step, or None when all do. `replicas` is the process group of the workers
    that hold the same layers, None when this worker is alone. `output_shape` is one sample's activation
    behind the last layer. Each layer trains on a batch in `micro_batches` parts. What is random in it, as dropout is,
    depends on `seed`, step, layer and replica. Where there are `averages`, one for
    each layer, they are the weights that count; `updates(step)` is how many each layer that trains has had before.
    """

    first: int
    layers: Sequence[LocalLayer]
    optimizers: Sequence[torch.optim.Optimizer]
    receiver: Receiver | None
    sender: Sender | None
    learning_rate: Callable[[int, int], float]
    trained: Callable[[int], int | None]
    output_shape: tuple[int, ...]
    device: torch.device
    autocast_dtype: torch.dtype | None = None
    grad_clip: float | None = None
    micro_batches: int = 1
    seed: int = 0
    replicas: dist.ProcessGroup | None = None
    averages: Sequence[WeightAverage] = ()
    updates: Callable[[int], int] = int
    times: StageTimes = field(default_factory=StageTimes)
    trace: Trace = field(default_factory=Trace)
    totals: list[LayerTotals] = field(init=False)
    _settled: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.totals = [self._no_totals() for _ in self.layers]

    def _no_totals(self) -> LayerTotals:
        return LayerTotals(
            torch.zeros((), dtype=torch.float64, device=self.device),
            torch.zeros((), dtype=torch.int64, device=self.device),
        )

    def take_totals(self) -> tuple[list[LayerTotals], StageTimes]:
        """Return and reset the sums and the clocks."""
        taken, self.totals = self.totals, [self._no_totals() for _ in self.layers]
        times, self.times = self.times, StageTimes()
        times.wait_replicas_s += sum(take_waited(layer) for layer in self.layers)
        return taken, times

    def scales(self) -> list[float | None]:
        """The factor between cosines and logits of each layer; None where its head has none."""
        heads = (layer.head for layer in self.layers)
        return [float(head.scale.detach()) if isinstance(head, PrototypeHead) else None for head in heads]

    def receive(self) -> StageInput:
        """The next batch from the stage before; its transfer was under way during the last step."""
        assert self.receiver is not None, "the first stage reads from a stream, not from a link"
        with self.trace.span("receive"):
            began = time.perf_counter()
            message = self.receiver.recv()
            self.times.wait_input_s += time.perf_counter() - began
            to = self.device
            vote = None if message.vote is None else message.vote.to(to)
            x, target = message.activation.to(to), message.target.to(to)
            partner = None if message.partner is None else message.partner.to(to)
        flags = (message.last, message.stop, message.count)
        return StageInput(message.step, x, target, vote, *flags, partner, message.partner_weight)

    def train_step(self, batch: StageInput) -> bool:
        """Train the layers of this stage on one batch. Returns whether the run stops after this step.

        Raises NonFiniteLoss before the update of the first layer whose loss is not finite.
        """
        count, stop = self._agree(batch)
        active = self.trained(batch.step)
        last_trained = self.first + len(self.layers) - 1 if active is None else active
        x = batch.x
        summing: _Sum | None = None
        for i, layer in enumerate(self.layers):
            index = self.first + i
            if index > last_trained:
                break
            if active is not None and index < active:
                self._settle(i)
                with self.trace.span("forward", index):
                    x = self._pass_frozen(layer, x)
                continue
            layer.train()
            began = time.perf_counter()
            self._seed_noise(index, batch.step)
            update = local_forward_backward(
                layer,
                x,
                batch.target,
                count=count,
                partner=batch.partner,
                partner_weight=batch.partner_weight,
                micro_batches=self._parts(count),
                autocast_dtype=self.autocast_dtype,
                phase=functools.partial(self.trace.span, layer=index),
            )
            self.totals[i].seconds += time.perf_counter() - began
            # The gradients of the layer before were being summed meanwhile.
            self._end_sum(summing, batch.step)
            self._refuse_non_finite(index, batch.step, update.loss_sum)
            x = _as_carried(update.output)
            if active is None and i == len(self.layers) - 1:
                self._send("train", batch, x, None, stop, count)
            summing = self._begin_sum(i)
            if summing is None:
                self._apply(i, batch.step)
            totals = self.totals[i]
            totals.loss += update.loss_sum
            totals.correct += update.correct
            totals.samples += len(batch.target)
        self._end_sum(summing, batch.step)
        if active is not None:
            self._send_sequential(batch, x, stop, count, frozen=active >= self.first + len(self.layers))
        return stop

    def _seed_noise(self, layer: int, step: int) -> None:
        replica = 0 if self.replicas is None else self.replicas.rank()
        seed_noise(derive_seed(self.seed, "noise", step, layer, replica), self.device)

    def _parts(self, samples: int) -> int:
        """Micro-batches of a step of so many samples: as many with all replicas, and none with less than two samples.

        The norms of all replicas wait for one another, and one sample alone has no variance.
        """
        replicas = 1 if self.replicas is None else self.replicas.size()
        return max(1, min(self.micro_batches, samples // (2 * replicas)))

    def _send_sequential(self, batch: StageInput, x: Tensor, stop: bool, count: int, *, frozen: bool) -> None:
        """Feed the stage that trains; those behind it get empty batches, which keep all in step."""
        if frozen:
            self._send("train", batch, x, None, stop, count)
        elif self.sender is not None:
            nothing = torch.empty((0, *self.output_shape), dtype=x.dtype, device=self.device)
            empty = StageInput(batch.step, batch.x[:0], batch.target[:0])
            self._send("train", empty, nothing, None, stop, count)

    def _agree(self, batch: StageInput) -> tuple[int, bool]:
        """Valid samples of the global batch, and whether any replica was told to stop after this step.

        The first stage agrees on both; to the others they come with the batch.
        """
        return (batch.count, batch.stop) if batch.count else self.sum_over_replicas(len(batch.target), batch.stop)

    def sum_over_replicas(self, count: int, stop: bool) -> tuple[int, bool]:
        """The counts of all replicas of this stage together, and whether any of them wants to stop; all call it."""
        if self.replicas is None:
            return count, stop
        both = torch.tensor([count, int(stop)], dtype=torch.int64)
        began = time.perf_counter()
        with self.trace.span("agree"):
            dist.all_reduce(both, group=self.replicas)
        self.times.wait_replicas_s += time.perf_counter() - began
        return int(both[0]), bool(both[1])

    def _refuse_non_finite(self, layer: int, step: int, loss_sum: Tensor) -> None:
        # On a GPU this look would make every step wait for the device; there the loop looks where it waits anyway.
        if self.device.type == "cpu" and not math.isfinite(loss_sum):
            raise NonFiniteLoss(layer, step)

    def _settle(self, i: int) -> None:
        """A layer that has learned all that it will is its average from then on: what counts is what is built upon."""
        if self.averages and i not in self._settled:
            self.averages[i].adopt()
            self._settled.add(i)

    @contextmanager
    def weights_that_count(self) -> Iterator[None]:
        """All layers with their averages for weights, where there are any."""
        with ExitStack() as stack:
            for average in self.averages:
                stack.enter_context(average.in_place())
            yield

    def _pass_frozen(self, layer: LocalLayer, x: Tensor) -> Tensor:
        layer.eval()
        with torch.no_grad(), self._autocast():
            parts: list[Tensor] = [layer(part) for part in self._divided(x)]
        y = parts[0] if len(parts) == 1 else torch.cat(parts)
        return _as_carried(y if self.autocast_dtype is None else y.to(self.autocast_dtype))

    def _divided(self, x: Tensor) -> Sequence[Tensor]:
        """As in training, so that what fits into memory there fits here."""
        return x.tensor_split(max(1, min(self.micro_batches, len(x))))

    def _autocast(self) -> torch.autocast:
        enabled = self.autocast_dtype is not None
        return torch.autocast(self.device.type, dtype=self.autocast_dtype or torch.bfloat16, enabled=enabled)

    def _send(self, kind: Kind, batch: StageInput, x: Tensor, vote: Tensor | None, stop: bool, count: int = 0) -> None:
        if self.sender is None:
            return
        if x.numel() and x.untyped_storage().data_ptr() == batch.x.untyped_storage().data_ptr():
            x = x.clone()  # handed on as it came: its buffer is received into again before it has gone
        waited = self.sender.waited_s
        with self.trace.span("send"):
            mix = (batch.partner, batch.partner_weight)
            self.sender.send(Message(batch.step, kind, batch.last, stop, x, batch.target, vote, count, *mix))
        self.times.wait_output_s += self.sender.waited_s - waited

    def _begin_sum(self, i: int) -> _Sum | None:
        """Begin to sum a layer's gradients over all replicas: each is already divided by the global count."""
        if self.replicas is None:
            return None
        gradients = [p.grad for p in self.layers[i].parameters() if p.grad is not None]
        began_ns = self.trace.now()
        flat = torch.cat([g.reshape(-1) for g in gradients])
        work = dist.all_reduce(flat, group=self.replicas, async_op=True)
        assert work is not None
        return _Sum(i, gradients, flat, work, began_ns)

    def _end_sum(self, summing: _Sum | None, step: int) -> None:
        """Wait for the sum and update the layer with it."""
        if summing is None:
            return
        index = self.first + summing.layer
        began = time.perf_counter()
        with self.trace.span("wait for sum", index):
            summing.work.wait()
        self.times.wait_replicas_s += time.perf_counter() - began
        self.trace.since(summing.began_ns, BESIDE, index)
        sizes = [g.numel() for g in summing.gradients]
        for gradient, summed in zip(summing.gradients, torch.split(summing.flat, sizes), strict=True):
            gradient.copy_(summed.view_as(gradient))
        self._apply(summing.layer, step)

    def _apply(self, i: int, step: int) -> None:
        layer, optimizer = self.layers[i], self.optimizers[i]
        began = time.perf_counter()
        with self.trace.span("update", self.first + i):
            if self.grad_clip is not None:
                torch.nn.utils.clip_grad_norm_(layer.parameters(), self.grad_clip)
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate(step, self.first + i)
            local_update(layer, optimizer)
            if self.averages:
                self.averages[i].update(self.updates(step))
        self.totals[i].seconds += time.perf_counter() - began

    @torch.no_grad()
    def evaluate(
        self,
        batch: StageInput,
        vote_weights: Sequence[float],
        correct: Tensor,
        opinions: list[list[Tensor]] | None = None,
    ) -> Tensor:
        """Classify one batch with frozen layers and pass it on; returns the votes so far, (B, C) float32.

        `vote_weights` has one weight per layer of the network, 0 for those without a vote; `correct`
        (layers of this stage,) int64 counts the right top-1 classes of each layer; `opinions`, one list per layer
        of this stage, get its log-probabilities, (B, C) float32.
        """
        x, vote = batch.x, batch.vote
        if not len(batch.target):
            return self._evaluate_nothing(batch, opinions)
        for i, layer in enumerate(self.layers):
            x = self._pass_frozen(layer, x)
            logit_BC = torch.cat([layer.logits(part) for part in self._divided(x)])
            correct[i] += (logit_BC.argmax(dim=1) == batch.target).sum()
            weight = vote_weights[self.first + i]
            if weight or vote is None or opinions is not None:
                log_prob_BC = torch.log_softmax(logit_BC.float(), dim=1)
                if opinions is not None:
                    opinions[i].append(log_prob_BC)
                vote = weight * log_prob_BC if vote is None else vote + weight * log_prob_BC
        assert vote is not None
        self._send("eval", batch, x, vote, batch.stop)
        return vote

    def _evaluate_nothing(self, batch: StageInput, opinions: list[list[Tensor]] | None) -> Tensor:
        """Keep in step with the other replicas; a user's body may not take a batch without samples."""
        none_BC = torch.zeros((0, self.layers[-1].head.num_classes), device=self.device)
        for own in opinions or []:
            own.append(none_BC)
        vote = none_BC if batch.vote is None else batch.vote
        nothing = torch.empty((0, *self.output_shape), device=self.device)
        self._send("eval", batch, nothing, vote, batch.stop)
        return vote


def _as_carried(y: Tensor) -> Tensor:
    """In the layout in which links carry it: what comes next computes the same bits in this stage and in another."""
    if y.dim() > 4:  # versions of images, which no link carries
        return y
    return y.contiguous(memory_format=torch.channels_last if y.dim() == 4 else torch.contiguous_format)
