"""The peers of the pipeline: one network, batch and number of workers under every schedule.

`local`: our layers with their own losses. `BP`: the same bodies with one head, in one process, under DDP and under
the schedules of torch.distributed.pipelining. Adam with the same arguments everywhere, one thread per process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.nn.parallel import DistributedDataParallel

from benchmarks.crew import Calls, timed
from benchmarks.memory import Held
from hff.architectures import HeadOptions, build_layers
from hff.local import make_optimizer
from hff.shapes import HeadShape, VggOptions, describe
from orchestrator.pipeline.connect import open_links
from orchestrator.pipeline.links import LinkShape
from orchestrator.pipeline.mesh import Mesh
from orchestrator.pipeline.stage import Stage, StageInput

CLASSES, STAGES = 10, 2
SCHEDULES = {"GPipe": ScheduleGPipe, "1F1B": Schedule1F1B}


@dataclass(frozen=True)
class Setting:
    """`layers` equal convolutions of `width` on maps of `size` x `size`, what a stem would put out."""

    layers: int = 6
    width: int = 64
    size: int = 16
    batch: int = 128
    micro_batches: tuple[int, ...] = (2, 4, 8, 16)
    timeout_s: float = 120.0

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return (self.width, self.size, self.size)

    @property
    def options(self) -> VggOptions:
        return VggOptions(widths=(self.width,) * self.layers, pool_after=())

    @property
    def ranges(self) -> list[tuple[int, int]]:
        half = self.layers // STAGES
        return [(0, half - 1), (half, self.layers - 1)]

    def samples(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(self.batch, *self.input_shape, generator=generator)
        target = torch.randint(CLASSES, (self.batch,), generator=generator)
        return images.contiguous(memory_format=torch.channels_last), target


@dataclass(frozen=True)
class Method:
    """One way to train on one worker: a step of the whole batch, what its transport holds, what it has sent."""

    step: Callable[[], object]
    not_held: Sequence[Tensor]
    buffers: Sequence[Tensor] = ()
    sent_bytes: Callable[[], int] = lambda: 0

    def sent_per_step(self) -> int:
        """Bytes that this worker sends in a step."""
        before = self.sent_bytes()
        self.step()
        return self.sent_bytes() - before

    def held_bytes(self) -> int:
        """Peak of what one step keeps for backward and of the transport's buffers; parameters and input left out."""
        with Held(self.not_held) as held:
            for buffer in self.buffers:
                held.take(buffer)
            with _Transfers(held):
                self.step()
        return held.peak_bytes


class _Transfers:
    """Sees every message that torch.distributed.pipelining sends or awaits: its bytes, and the buffer as held."""

    total = 0

    def __init__(self, held: Held | None = None) -> None:
        self._held, self._operation = held, dist.P2POp

    def __enter__(self) -> None:
        held = self._held

        class Seen(self._operation):  # type: ignore[misc, name-defined]
            def __init__(self, op: Callable[..., Any], tensor: Tensor, *arguments: Any, **options: Any) -> None:
                super().__init__(op, tensor, *arguments, **options)
                _Transfers.total += tensor.numel() * tensor.element_size() * (op is dist.isend)
                if held is not None:
                    held.buffer(tensor)

        dist.P2POp = Seen

    def __exit__(self, *exc: object) -> None:
        dist.P2POp = self._operation  # type: ignore[misc]


# --- our layers


def local_stage(setting: Setting, first: int, last: int, receiver: Any = None, sender: Any = None) -> Stage:
    head = HeadOptions("prototype", CLASSES)
    layers = build_layers(setting.options, setting.input_shape, head, seed=0, only=range(first, last + 1))
    return Stage(
        first=first,
        layers=[layer.to(memory_format=torch.channels_last) for layer in layers],
        optimizers=[make_optimizer(layer, "adamw", lr=1e-3) for layer in layers],
        receiver=receiver,
        sender=sender,
        learning_rate=lambda step, layer: 1e-3,
        trained=lambda step: None,
        output_shape=describe(setting.options, setting.input_shape, HeadShape("prototype", CLASSES, 1))[last].output,
        device=torch.device("cpu"),
    )


def _local(setting: Setting, rank: int, transport: str, batch: int, token: str) -> Method:
    """One stage on each worker, `batch` samples a step."""
    link = LinkShape(setting.input_shape, torch.float32, batch, CLASSES, "channels_last")
    receiver, sender = open_links(
        Mesh((1,) * STAGES),
        rank,
        link if rank else None,
        None if rank else link,
        transport=transport,
        timeout_s=setting.timeout_s,
        token=token,
    )
    stage = local_stage(setting, *setting.ranges[rank], receiver, sender)
    x, target = (part[:batch] for part in setting.samples())
    end: Any = receiver or sender
    return Method(
        lambda: stage.train_step(stage.receive() if rank else StageInput(0, x, target)),
        [x, *(p for layer in stage.layers for p in layer.parameters())],
        [slot.header for slot in end._slots],
        lambda: 0 if sender is None else sender.bytes_total,
    )


def _local_alone(setting: Setting, rank: int, batch: int) -> Method:
    """All layers in the first process; the other one has nothing to do."""
    stage = local_stage(setting, 0, setting.layers - 1)
    x, target = (part[:batch] for part in setting.samples())
    parameters = [p for layer in stage.layers for p in layer.parameters()]
    return Method(lambda: rank or stage.train_step(StageInput(0, x, target)), [x, *parameters])


# --- the same bodies with one loss


def _bp_modules(setting: Setting) -> tuple[list[nn.Module], Callable[[Tensor, Tensor], Tensor]]:
    """The bodies, with the head behind the last, and the loss of what that puts out, a mean."""
    head = HeadOptions("prototype", CLASSES)
    (whole,) = build_layers(setting.options, setting.input_shape, head, seed=0, end_to_end=True)
    bodies = list(whole.body.to(memory_format=torch.channels_last).children())
    return [*bodies[:-1], nn.Sequential(bodies[-1], whole.head)], lambda y, target: whole.head.loss(y, target).mean()


def _adam(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=1e-3, weight_decay=0.0, foreach=True)


def _bp_whole(setting: Setting, rank: int, pieces: int, replicated: bool) -> Method:
    """One process (the other has nothing to do), or DDP with half of the batch in each; accumulates over `pieces`."""
    modules, loss = _bp_modules(setting)
    network: nn.Module = nn.Sequential(*modules)
    parameters = list(network.parameters())
    x, target = setting.samples()
    if replicated:
        network = DistributedDataParallel(network, bucket_cap_mb=1)
        x, target = x.chunk(STAGES)[rank], target.chunk(STAGES)[rank]
    optimizer = _adam(network)
    parts = list(zip(x.chunk(pieces), target.chunk(pieces), strict=True))

    def step() -> None:
        if rank and not replicated:
            return
        for i, (x_part, target_part) in enumerate(parts):
            if isinstance(network, DistributedDataParallel):
                network.require_backward_grad_sync = i == len(parts) - 1
            (loss(network(x_part), target_part) / len(parts)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    # A ring sends every number on twice, but for its own share.
    ring = 2 * (STAGES - 1) * sum(p.numel() * p.element_size() for p in parameters) // STAGES
    sent = [0]

    def counted() -> None:
        step()
        sent[0] += ring * replicated

    return Method(counted, [x, *parameters], sent_bytes=lambda: sent[0])


class _Dense(torch.autograd.Function):
    """The same values, contiguous; so is their gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.contiguous()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0].contiguous()


class _Border(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Dense.apply(x)
        return y


def _bp_pipeline(setting: Setting, rank: int, schedule: str, micro_batches: int) -> Method:
    """A schedule of torch.distributed.pipelining."""
    modules, loss = _bp_modules(setting)
    first, last = setting.ranges[rank]
    # gloo takes what its schedules send only when it is contiguous.
    own = (
        nn.Sequential(*modules[first : last + 1], _Border())
        if rank == 0
        else nn.Sequential(_Border(), *modules[first : last + 1])
    )
    optimizer = _adam(own)
    stage = PipelineStage(own, rank, STAGES, torch.device("cpu"))
    plan = SCHEDULES[schedule](stage, micro_batches, loss_fn=loss)
    x, target = setting.samples()

    def step() -> None:
        if rank == 0:
            plan.step(x)
        else:
            plan.step(target=target, losses=[])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def counted() -> int:
        return _Transfers.total

    return Method(step, [x, *own.parameters()], sent_bytes=counted)


MAKERS: dict[str, Callable[..., Method]] = {
    "local": _local,
    "local alone": _local_alone,
    "BP": _bp_whole,
    "pipelining": _bp_pipeline,
}


def answers(rank: int, setting: Setting) -> Calls:
    """What a process of a crew can do: make a method, time it, count its memory and what it sends."""
    methods: dict[str, Method] = {}

    def make(name: str, maker: str, *arguments: Any, **options: Any) -> None:
        methods[name] = MAKERS[maker](setting, rank, *arguments, **options)
        for _ in range(2):
            methods[name].step()

    def sent(name: str) -> int:
        with _Transfers():
            return methods[name].sent_per_step()

    return {
        "make": make,
        "time": lambda name, steps: timed(methods[name].step, steps),
        "held": lambda name: methods[name].held_bytes(),
        "sent": sent,
    }
