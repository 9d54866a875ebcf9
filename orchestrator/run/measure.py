"""Seconds of every layer's training step on the device that a job wants, measured here."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from hff.layers import LocalLayer, channels_last
from hff.local import local_forward_backward, local_update, make_optimizer
from hff.shapes import LayerShape
from orchestrator.errors import JobError
from orchestrator.job.network import cached_features
from orchestrator.job.resolved import job_to_dict
from orchestrator.job.schema import Job
from orchestrator.pipeline.cost import LayerCost
from orchestrator.run import network
from orchestrator.run.device import keep_freed_memory

# The batch that layers are measured with, where the job's own is larger.
_BATCH = 64
_REPETITIONS = 5


def measured_costs(job: Job, shapes: Sequence[LayerShape], classes: int) -> tuple[LayerCost, ...]:
    """Time the local step of each layer, on random activations, at a batch and at half of it.

    The line through both gives seconds per sample and per step. Raises JobError where the job's device is not here.
    """
    if job.cluster.use_gpu and not torch.cuda.is_available():
        raise JobError("--profile: cluster.use_gpu is true, but this machine has no GPU that torch can use")
    if cached_features(job) is not None:
        raise JobError("--profile: cannot time layers on cached features; plan with --set features.cache=false")
    device = torch.device("cuda" if job.cluster.use_gpu else "cpu")
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(job.cluster.threads_per_worker)
        keep_freed_memory()  # as the workers do
    try:
        return tuple(_cost(job, shape, index, classes, device) for index, shape in enumerate(shapes))
    finally:
        torch.set_num_threads(threads)


def _cost(job: Job, shape: LayerShape, index: int, classes: int, device: torch.device) -> LayerCost:
    values = job_to_dict(job)
    size = job.data.image_size
    (layer,) = network.build(
        values["model"],
        values["objective"],
        input_shape=(job.data.channels, size, size),
        num_classes=classes,
        seed=job.train.seed,
        precision=job.train.precision,
        only=[index],
        per_layer=values["per_layer"],
        pretrained=False,
    )
    layer = channels_last(layer.to(device)).train()
    batch = max(2, min(_BATCH, job.train.global_batch_size))
    half = max(1, batch // 2)
    step = _stepper(job, layer, shape, classes, batch, device)
    whole_s, half_s = _seconds(lambda: step(batch), device), _seconds(lambda: step(half), device)
    sample_s = max(0.0, (whole_s - half_s) / (batch - half))
    return LayerCost(sample_s, max(0.0, whole_s - batch * sample_s))


def _stepper(
    job: Job, layer: LocalLayer, shape: LayerShape, classes: int, batch: int, device: torch.device
) -> Callable[[int], None]:
    """One training step of the layer on so many random samples."""
    bfloat = job.train.precision == "bfloat16"
    autocast = torch.bfloat16 if bfloat else None
    versions = (2,) if job.objective.name == "ff" else ()
    x = torch.randn(batch, *versions, *shape.input, dtype=network.DTYPES[job.train.precision], device=device)
    if x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    target = torch.randint(classes, (batch,), device=device)
    optimizer = make_optimizer(layer, job.train.optimizer, lr=1e-6)

    def step(samples: int) -> None:
        local_forward_backward(layer, x[:samples], target[:samples], count=samples, autocast_dtype=autocast)
        local_update(layer, optimizer)

    return step


def _seconds(step: Callable[[], None], device: torch.device) -> float:
    """The fastest of some repetitions: what other programs take away is not the layer's."""
    taken = []
    for _ in range(_REPETITIONS + 1):
        began = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - began)
    return min(taken[1:])
