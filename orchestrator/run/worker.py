"""One worker of one attempt: assemble stage, links and data, then run the loop. Knows no launcher."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hff.averages import WeightAverage
from hff.layers import LocalLayer, channels_last
from hff.local import make_optimizer
from orchestrator.data.cached.features import FeatureFolders
from orchestrator.errors import EXIT_OTHER, CheckpointError, OrchestratorError
from orchestrator.job.per_layer import of_layer
from orchestrator.pipeline.connect import all_places, open_links, refuse_shared_gpus
from orchestrator.pipeline.gather import synchronise
from orchestrator.pipeline.links import LinkError, LinkShape, Receiver, Sender
from orchestrator.pipeline.mesh import Mesh
from orchestrator.pipeline.stage import Stage
from orchestrator.run import checkpoint, network
from orchestrator.run.context import Context, Control
from orchestrator.run.datasets import Normalise, Numbers, Ready, open_datasets
from orchestrator.run.device import compile_layers, prepare_torch
from orchestrator.run.folder import RunFolder, write_json
from orchestrator.run.heartbeat import Heartbeat
from orchestrator.run.loop import Loop
from orchestrator.run.records.start import StartClock, on_worker
from orchestrator.run.saving import Saver
from orchestrator.run.schedule import Schedule, make_schedule
from orchestrator.run.shared import refuse_unshared
from orchestrator.run.stores.attached import StoreAddress, Uploads, attached
from orchestrator.run.superclasses import joined_classes
from orchestrator.transfer.cached import fed, trunk_sha256, trunk_units


@dataclass(frozen=True)
class Assignment:
    """What the driver decided for one attempt; plain values, so that any launcher can carry it."""

    job: dict[str, Any]
    job_sha256: str
    run_dir: str
    attempt: int
    resume_from: str | None
    weights_only: bool
    run_id: str | None
    ranges: list[tuple[int, int]]
    replicas: list[int]
    layer_names: list[str]
    layer_outputs: list[tuple[int, ...]]
    steps_per_epoch: int
    # The most samples in one step, over all replicas.
    max_batch: int
    micro_batches: int
    num_classes: int
    attempt_steps: list[list[int]]
    git_commit: str | None
    token: str
    # With the sequential schedule: end after the phases of so many layers.
    phases: int | None = None
    # The cached outputs of a frozen backbone, where the job trains on these.
    features: FeatureFolders | None = None
    # Where a run lies that is not in a folder.
    store: StoreAddress | None = None
    # Seconds from the command to the launch by what they went into, and the clock (time.time()) at the launch.
    before_launch: dict[str, float] = field(default_factory=dict)
    launched: float = 0.0
    # The driver makes the MLflow run meanwhile, and writes down in the run folder which it is.
    run_id_follows: bool = False
    # Cores of the one machine that all workers share; None where there may be more machines.
    cores: int | None = None

    @property
    def full(self) -> bool:
        """Whether every core of the one machine has a worker."""
        return self.cores is not None and sum(self.replicas) >= self.cores


def work(assignment: Assignment, context: Context, device: torch.device) -> str:
    """Run one attempt on this worker. Every failure is written down first; the outcome too."""
    with attached(assignment, context) as (placed, uploads):
        return _worked(placed, context, device, uploads)


def _worked(assignment: Assignment, context: Context, device: torch.device, uploads: Uploads | None) -> str:
    folder = RunFolder(Path(assignment.run_dir))
    start = on_worker(assignment.before_launch, assignment.launched)
    try:
        status, step = _work(assignment, context, device, folder, uploads, start)
        if context.rank == 0:
            outcome = {"attempt": assignment.attempt, "status": status, "step": step}
            # Until the driver has told MLflow: it may be stopped before.
            write_json(folder.outcome, outcome | ({"recorded": False} if status == "finished" else {}))
        return status
    except BaseException as error:
        with suppress(OSError):  # what ended it is worth more than that a full disk has no room for the report
            write_failure(folder, assignment.attempt, context.rank, error)
        raise


def _message(error: BaseException) -> str:
    """What the error says; one for want of memory, which comes in many forms, begins with the remedy."""
    text = str(error)
    if "DataLoader worker" in text and ("killed by signal" in text or "exited unexpectedly" in text):
        # What torch says depends on who notices first.
        return f"a loader process was killed, most likely for want of memory: lower data.loader_processes ({text})"
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text:
        remedy = "raise train.micro_batches, lower train.global_batch_size, data.loader_threads or loader_processes"
        return f"out of memory: {remedy}" + (f" ({text})" if text else "")
    return text


def write_failure(folder: RunFolder, attempt: int, rank: int, error: BaseException) -> None:
    """Leave a report of what ended this worker in the run folder, for `first_failure`."""
    path = folder.failure_file(attempt, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    lost = any(words in str(error) for words in ("Connection closed by peer", "Connection reset by peer"))
    consequence = isinstance(error, LinkError | dist.DistError) or lost
    write_json(
        path,
        {
            "rank": rank,
            "time": time.time(),
            "type": type(error).__name__,
            "message": _message(error),
            "exit_code": getattr(error, "exit_code", EXIT_OTHER),
            "expected": isinstance(error, OrchestratorError),
            # The loss of a neighbour is seen by its peers too; their reports come after the first cause.
            "consequence": consequence,
            "traceback": traceback.format_exc(),
        },
    )


def first_failure(folder: RunFolder, attempt: int) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """The report of the worker that failed first, and those of the others in order of time."""
    reports = []
    for path in folder.path.glob(f"failures/attempt-{attempt}-rank-*.json"):
        reports.append(json.loads(path.read_text(encoding="utf-8")))
    reports.sort(key=lambda r: (r["consequence"], r["time"]))
    return (reports[0], reports[1:]) if reports else (None, [])


def _work(
    assignment: Assignment,
    context: Context,
    device: torch.device,
    folder: RunFolder,
    uploads: Uploads | None,
    start: StartClock,
) -> tuple[str, int]:
    job = assignment.job
    prepare_torch(job["cluster"], device)
    control = Control(context.world_size, job["cluster"]["timeout_s"])
    if assignment.store is None:
        refuse_unshared(folder, assignment.token, context.rank, control)
    mesh = Mesh(assignment.replicas)
    stage_index, replica = mesh.place(context.rank)
    if device.type == "cuda" and context.world_size > 1:
        refuse_shared_gpus(mesh, all_places(device, control.group))
    datasets = open_datasets(job)
    depth = len(assignment.layer_names) if assignment.phases is None else assignment.phases
    schedule = make_schedule(
        job["train"],
        job["checkpoint"],
        steps_per_epoch=assignment.steps_per_epoch,
        layers=depth,
        per_layer=job["per_layer"],
    )
    layers = _own_layers(assignment, stage_index, device)
    first = assignment.ranges[stage_index][0]
    optimizers = [
        _optimizer(layer, of_layer(job["train"], job["per_layer"], first + i)) for i, layer in enumerate(layers)
    ]
    decay = job["train"]["ema_decay"]
    averages = [WeightAverage(layer, decay) for layer in layers] if decay else []
    _load_layers(assignment, schedule, first, layers, optimizers, averages)
    if assignment.features is not None:
        _refuse_other_trunk(assignment, first, layers)
        layers = fed(layers, first, assignment.features.parts)
    peers = _replica_group(mesh, stage_index, job["cluster"]["timeout_s"])
    if peers is not None:
        for layer in layers:
            synchronise(layer, peers)
    if job["train"]["compile"]:
        compile_layers(layers)
    receiver, sender = _links(assignment, mesh, context.rank, device, control)
    stage = Stage(
        first=first,
        layers=layers,
        optimizers=optimizers,
        receiver=receiver,
        sender=sender,
        learning_rate=schedule.learning_rate,
        trained=schedule.trained,
        output_shape=assignment.layer_outputs[assignment.ranges[stage_index][1]],
        device=device,
        autocast_dtype=torch.bfloat16 if job["train"]["precision"] == "bfloat16" else None,
        grad_clip=job["train"]["grad_clip"],
        micro_batches=assignment.micro_batches,
        seed=job["train"]["seed"],
        replicas=peers,
        averages=averages,
        updates=lambda step: step % schedule.steps_per_phase,
    )
    saver = _saver(assignment, folder, stage, mesh, context, uploads)
    try:
        # Before the neighbours give up on a worker that hangs.
        stall_s = 0.8 * job["cluster"]["timeout_s"]
        clocks = (stage_index, lambda: stage.times) if replica == 0 else None
        with Heartbeat(folder, assignment.attempt, context, stall_s=stall_s, stage=clocks) as heartbeat:
            loop = Loop(
                assignment=assignment,
                context=context,
                control=control,
                folder=folder,
                mesh=mesh,
                stage=stage,
                schedule=schedule,
                datasets=datasets,
                normalise=_ready(assignment, device),
                heartbeat=heartbeat,
                saver=saver,
                start=start,
            )
            return loop.run(), heartbeat.state["step"]
    finally:
        # Whatever ended the training, what it had saved by then is not lost.
        saver.drain()
        for link in (sender, receiver):
            if link is not None:
                link.close()


def _saver(
    assignment: Assignment,
    folder: RunFolder,
    stage: Stage,
    mesh: Mesh,
    context: Context,
    uploads: Uploads | None,
) -> Saver:
    options = assignment.job["checkpoint"]
    _, replica = mesh.place(context.rank)
    return Saver(
        folder=folder,
        attempt=assignment.attempt,
        stage=stage,
        # Of its own: saves in the background talk while the loop does.
        control=Control(context.world_size, assignment.job["cluster"]["timeout_s"]),
        writes=replica == 0,
        leads=context.rank == 0,
        keep_last=options["keep_last"],
        background=options["background"],
        uploads=uploads,
    )


def _load_layers(
    assignment: Assignment,
    schedule: Schedule,
    first: int,
    layers: list[LocalLayer],
    optimizers: list[torch.optim.Optimizer],
    averages: list[WeightAverage],
) -> None:
    """Bring the layers from `first` on to the state of the checkpoint to go on from.

    Layers whose phase has not begun are left as the seed made them: that is what the checkpoint has of them too,
    unless the run was forked from one in which they have other options.
    """
    if assignment.resume_from is None:
        return
    source = Path(assignment.resume_from)
    begun = len(assignment.layer_names)
    if not assignment.weights_only:
        begun = schedule.depth(checkpoint.read_state(source)["step"], begun)
    for i, (layer, optimizer) in enumerate(zip(layers, optimizers, strict=True)):
        if first + i < begun:
            average = averages[i] if averages else None
            checkpoint.load_layer(source, first + i, layer, None if assignment.weights_only else optimizer, average)


def _refuse_other_trunk(assignment: Assignment, first: int, layers: Sequence[LocalLayer]) -> None:
    """Weights of a checkpoint and cached features must come from one trunk."""
    features = assignment.features
    assert features is not None
    for unit, expected in zip(trunk_units(layers), features.trunk[first:], strict=False):
        if trunk_sha256([unit]) != expected:
            raise CheckpointError(
                f"model.pretrained: the frozen weights of {assignment.job['model']['backbone']} are not those that "
                f"{assignment.resume_from} was trained with; give the same file, or start afresh with --resume never"
            )


def _ready(assignment: Assignment, device: torch.device) -> Ready:
    """What makes the network's input of a batch."""
    dtype = network.DTYPES[assignment.job["train"]["precision"]]
    return Numbers(device, dtype) if assignment.features else Normalise(assignment.job["data"], device, dtype)


def _own_layers(assignment: Assignment, stage_index: int, device: torch.device) -> list[LocalLayer]:
    job = assignment.job
    first, last = assignment.ranges[stage_index]
    size = job["data"]["image_size"]
    layers = network.build(
        job["model"],
        job["objective"],
        input_shape=(job["data"]["channels"], size, size),
        num_classes=assignment.num_classes,
        seed=job["train"]["seed"],
        precision=job["train"]["precision"],
        per_layer=job["per_layer"],
        only=range(first, last + 1),
        # A checkpoint fills all layers but those whose phase has not begun.
        pretrained=assignment.resume_from is None or job["train"]["schedule"] == "sequential",
        superclasses=joined_classes(RunFolder(Path(assignment.run_dir))),
    )
    return [channels_last(layer.to(device)) for layer in layers]


def _optimizer(layer: LocalLayer, train: dict[str, Any]) -> torch.optim.Optimizer:
    return make_optimizer(
        layer,
        train["optimizer"],
        lr=train["lr"],
        weight_decay=train["weight_decay"],
        momentum=train["momentum"],
        betas=tuple(train["betas"]),
    )


def _replica_group(mesh: Mesh, stage_index: int, timeout_s: float) -> dist.ProcessGroup | None:
    """The group of the workers that hold the same layers; torch wants every worker to create every group."""
    mine: dist.ProcessGroup | None = None
    for stage in range(mesh.stages):
        if mesh.replicas[stage] == 1:
            continue
        group = dist.new_group(mesh.stage_ranks(stage), timeout=timedelta(seconds=timeout_s))
        if stage == stage_index:
            assert isinstance(group, dist.ProcessGroup)
            mine = group
    return mine


def _links(
    assignment: Assignment, mesh: Mesh, rank: int, device: torch.device, control: Control
) -> tuple[Receiver | None, Sender | None]:
    if mesh.stages == 1:
        return None, None
    stage_index, _ = mesh.place(rank)
    train = assignment.job["train"]
    dtype = torch.bfloat16 if train["precision"] == "bfloat16" else network.DTYPES[train["precision"]]

    def shape(stage: int) -> LinkShape:
        return LinkShape(
            activation=tuple(assignment.layer_outputs[assignment.ranges[stage][1]]),
            dtype=dtype,
            max_batch=assignment.max_batch,
            num_classes=assignment.num_classes,
            memory_format="channels_last",
            labels=2
            if assignment.job["data"]["augment"]["mixup"] or assignment.job["data"]["augment"]["cutmix"]
            else 1,
            wire=torch.bfloat16 if train["link_precision"] == "bfloat16" else None,
        )

    return open_links(
        mesh,
        rank,
        shape(stage_index - 1) if stage_index > 0 else None,
        shape(stage_index) if stage_index < mesh.stages - 1 else None,
        transport=assignment.job["cluster"]["transport"],
        timeout_s=assignment.job["cluster"]["timeout_s"],
        token=assignment.token,
        group=control.group,
        device=device,
    )
