"""Any mesh trains what one process trains: the same bits without replicas, the same but for rounding with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hff import HeadOptions, LocalLayer, ResnetOptions, VggOptions, build_layers, make_optimizer
from hff.local import local_forward_backward
from orchestrator.data.loading.order import batch_bounds, replica_slice
from orchestrator.pipeline.connect import open_links
from orchestrator.pipeline.gather import synchronise
from orchestrator.pipeline.links import LinkShape
from orchestrator.pipeline.mesh import Mesh
from orchestrator.pipeline.stage import Stage, StageInput
from tests.pipeline.ranks import run_ranks

CLASSES, SAMPLES, BATCH, EPOCHS = 3, 63, 12, 2
WIDTHS = {"widths": (4, 6, 6, 8), "pool_after": (1,), "norm": "batch"}
# Plain layers, and layers with everything that sees the whole batch or has parts of its own in the head.
NETWORKS = {
    "plain": (VggOptions(**WIDTHS), HeadOptions(num_classes=CLASSES)),
    "levers": (
        ResnetOptions(**WIDTHS),
        HeadOptions(num_classes=CLASSES, similarity=0.5, aux_convs=1, groups=(0, 1, 0)),
    ),
}
OUTPUTS = [(4, 8, 8), (6, 4, 4), (6, 4, 4), (8, 4, 4)]
# The last batch of an epoch has 3 samples.
BOUNDS = batch_bounds(SAMPLES, BATCH)
# Layers of each stage, by the number of stages.
RANGES = {1: [(0, 3)], 2: [(0, 1), (2, 3)], 3: [(0, 0), (1, 2), (3, 3)], 4: [(0, 0), (1, 1), (2, 2), (3, 3)]}

State = dict[str, np.ndarray[Any, Any]]


def samples(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(SAMPLES, 3, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    return images.contiguous(memory_format=torch.channels_last), torch.randint(CLASSES, (SAMPLES,), generator=generator)


class KeepsGradients(torch.optim.SGD):
    """Instead of an update, the layer's whole gradient as one vector."""

    kept: Tensor | None = None

    def step(self, closure: Any = None) -> None:
        self.kept = torch.cat([p.grad.ravel() for group in self.param_groups for p in group["params"]])


def an_optimizer(layer: LocalLayer, name: str) -> torch.optim.Optimizer:
    if name == "none":
        return KeepsGradients(layer.parameters(), lr=1.0)
    return make_optimizer(layer, name, lr=0.05)


def a_stage(first: int, last: int, dtype: torch.dtype, optimizer: str, network: str = "plain", **links: Any) -> Stage:
    options, head = NETWORKS[network]
    built = build_layers(options, (3, 8, 8), head, seed=0, only=range(first, last + 1))
    layers = [layer.to(dtype).to(memory_format=torch.channels_last) for layer in built]
    return Stage(
        first=first,
        layers=layers,
        optimizers=[an_optimizer(layer, optimizer) for layer in layers],
        learning_rate=lambda step, layer: 0.05 / (1 + step + layer),
        trained=lambda step: None,
        output_shape=OUTPUTS[last],
        device=torch.device("cpu"),
        **{"receiver": None, "sender": None, "replicas": None, **links},
    )


def batches(replica: int, replicas: int, steps: int, dtype: torch.dtype) -> Iterator[StageInput]:
    images, labels = samples(dtype)
    for step in range(steps):
        own = slice(*replica_slice(*BOUNDS[step % len(BOUNDS)], replica, replicas))
        yield StageInput(step, images[own], labels[own], stop=step == steps - 1 and replica == 0)


def state_of(stage: Stage) -> State:
    """Every parameter and buffer, and gradients that were kept."""
    state: State = {}
    for i, (layer, optimizer) in enumerate(zip(stage.layers, stage.optimizers, strict=True), start=stage.first):
        state |= {f"{i}.{key}": value.numpy().copy() for key, value in layer.state_dict().items()}
        if isinstance(optimizer, KeepsGradients) and optimizer.kept is not None:
            state[f"{i}.gradient"] = optimizer.kept.numpy()
    return state


def train_as_rank(
    rank: int,
    replicas: Sequence[int],
    steps: int,
    dtype: torch.dtype,
    optimizer: str,
    transport: str,
    micro_batches: int = 1,
    network: str = "plain",
    wire: torch.dtype | None = None,
) -> dict[str, Any]:
    """One rank's part of a run: what it owns at the end, and what it was told."""
    mesh = Mesh(replicas)
    number, replica = mesh.place(rank)
    ranges = RANGES[mesh.stages]

    def link(stage: int) -> LinkShape:
        return LinkShape(OUTPUTS[ranges[stage][1]], dtype, BATCH, CLASSES, "channels_last", wire=wire)

    receiver, sender = open_links(
        mesh,
        rank,
        link(number - 1) if number else None,
        link(number) if number < mesh.stages - 1 else None,
        transport=transport,
        timeout_s=120.0,
        token=f"test-{dist.get_world_size()}-{transport}-{'-'.join(map(str, replicas))}-{steps}",
    )
    groups = [dist.new_group(mesh.stage_ranks(s)) if count > 1 else None for s, count in enumerate(replicas)]
    ends = {"receiver": receiver, "sender": sender, "replicas": groups[number]}
    stage = a_stage(*ranges[number], dtype, optimizer, network, micro_batches=micro_batches, **ends)
    if groups[number] is not None:
        for layer in stage.layers:
            synchronise(layer, groups[number])
    feed = batches(replica, replicas[0], steps, dtype) if number == 0 else None
    stops = [stage.train_step(next(feed) if feed is not None else stage.receive()) for _ in range(steps)]
    totals, _ = stage.take_totals()
    dist.barrier()  # who closes a link first takes what lies in it along
    for end in (receiver, sender):
        if end is not None:
            end.close()
    return {
        "replica": replica,
        "state": state_of(stage),
        "stops": stops,
        "samples": {stage.first + i: t.samples for i, t in enumerate(totals)},
        "correct": {stage.first + i: int(t.correct) for i, t in enumerate(totals)},
        "loss": {stage.first + i: float(t.loss) for i, t in enumerate(totals)},
    }


def train_alone(
    steps: int,
    dtype: torch.dtype,
    optimizer: str,
    micro_batches: int = 1,
    network: str = "plain",
    rounds_before: Sequence[int] = (),
) -> tuple[State, list[tuple[int, float]]]:
    """Of one process: the network, right answers and loss of each layer.

    The layers of `rounds_before` get their input rounded to bfloat16.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        stage = a_stage(0, 3, dtype, optimizer, network, micro_batches=micro_batches)
        for index in rounds_before:
            stage.layers[index].register_forward_pre_hook(lambda _, x: (x[0].bfloat16().to(x[0].dtype),))
        for batch in batches(0, 1, steps, dtype):
            stage.train_step(batch)
    finally:
        torch.set_num_threads(threads)
    totals, _ = stage.take_totals()
    return state_of(stage), [(int(t.correct), float(t.loss)) for t in totals]


def together(parts: list[dict[str, Any]]) -> State:
    """The network as a checkpoint has it, of the first replica of each stage; all replicas must agree on it."""
    states: State = {}
    for part in sorted(parts, key=lambda p: p["replica"]):
        for key, value in part["state"].items():
            assert np.array_equal(states.setdefault(key, value), value), f"replicas differ in {key}"
    return states


def totals_of(parts: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """Right answers and loss of each layer, of stages without replicas."""
    return [(part["correct"][layer], part["loss"][layer]) for part in parts for layer in part["correct"]]


def assert_same_but_for_rounding(parts: list[dict[str, Any]], alone: State, totals: list[tuple[int, float]]) -> None:
    """Every tensor to 1e-9 of its largest value, as many right answers of each layer, and the same loss."""
    meshed = together(parts)
    assert meshed.keys() == alone.keys()
    for key, value in alone.items():
        difference = np.abs(meshed[key] - value).max()
        assert difference <= 1e-9 * np.abs(value).max(), f"{key}: {difference}"
    for layer, (right, loss) in enumerate(totals):
        assert sum(part["correct"].get(layer, 0) for part in parts) == right
        assert sum(part["samples"].get(layer, 0) for part in parts) == EPOCHS * SAMPLES
        assert sum(part["loss"].get(layer, 0.0) for part in parts) == pytest.approx(loss, rel=1e-9)


STEPS = EPOCHS * len(BOUNDS)


@pytest.mark.parametrize(
    ("stages", "transport"), [(2, "shm"), (3, "shm"), (4, "shm"), (2, "gloo"), (3, "gloo"), (4, "gloo"), (4, "nccl")]
)
def test_stages_without_replicas_give_the_bits_of_one_process(stages: int, transport: str) -> None:
    parts = run_ranks(stages, train_as_rank, [1] * stages, STEPS, torch.float32, "adamw", transport)
    alone, totals = train_alone(STEPS, torch.float32, "adamw")
    piped = together(parts)
    assert piped.keys() == alone.keys()
    for key, value in alone.items():
        assert np.array_equal(piped[key], value), key
    assert totals_of(parts) == totals


def test_links_of_bfloat16_give_the_bits_of_one_process_that_rounds_at_the_same_borders() -> None:
    """And nearly what exact links give: over two epochs no tensor ends farther off than a quarter of its way."""
    train = ([1, 1, 1], STEPS, torch.float32, "sgd", "gloo", 1, "plain", torch.bfloat16)
    piped = together(run_ranks(3, train_as_rank, *train))
    alone, _ = train_alone(STEPS, torch.float32, "sgd", rounds_before=(1, 3))
    exact, _ = train_alone(STEPS, torch.float32, "sgd")
    start = state_of(a_stage(0, 3, torch.float32, "sgd"))
    for key, value in alone.items():
        assert np.array_equal(piped[key], value), key
        moved, off = (np.linalg.norm(exact[key] - other[key]) for other in (start, piped))
        assert off <= moved / 4, key
    assert any(not np.array_equal(piped[key], exact[key]) for key in exact if not key.startswith("0."))


@pytest.mark.parametrize(
    ("replicas", "transport"),
    [
        ([2, 1], "auto"),
        ([1, 2], "auto"),
        ([2, 2], "auto"),
        ([3, 2], "auto"),
        ([1, 4, 1], "auto"),
        ([1, 3, 2], "nccl"),
    ],
)
def test_replicas_in_float64_agree_with_one_process_after_two_epochs(replicas: list[int], transport: str) -> None:
    """Also where a replica of four has no sample of the last batch of three."""
    parts = run_ranks(sum(replicas), train_as_rank, replicas, STEPS, torch.float64, "adamw", transport)
    alone, totals = train_alone(STEPS, torch.float64, "adamw")
    assert_same_but_for_rounding(parts, alone, totals)
    for part in parts:
        assert part["stops"] == [False] * (STEPS - 1) + [True], "one replica's wish reaches all in the same step"


@pytest.mark.parametrize("replicas", [[2, 1], [1, 2], [2, 2]])
def test_gradients_of_the_first_step_in_float32_agree_with_one_process(replicas: list[int]) -> None:
    parts = run_ranks(sum(replicas), train_as_rank, replicas, 1, torch.float32, "none", "auto")
    alone, _ = train_alone(1, torch.float32, "none")
    meshed = together(parts)
    for layer in range(4):
        ours, theirs = (state[f"{layer}.gradient"] for state in (meshed, alone))
        assert np.linalg.norm(theirs) > 0
        assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs), f"layer {layer}"


def test_levers_in_stages_give_the_bits_of_one_process() -> None:
    """Shortcuts, hidden convolutions, super-classes and the similarity term."""
    parts = run_ranks(2, train_as_rank, [1, 1], STEPS, torch.float32, "adamw", "shm", 1, "levers")
    alone, totals = train_alone(STEPS, torch.float32, "adamw", network="levers")
    for key, value in together(parts).items():
        assert np.array_equal(value, alone[key]), key
    assert totals_of(parts) == totals


@pytest.mark.parametrize("replicas", [[2, 1], [1, 4, 1]])
def test_the_similarity_term_sees_the_samples_of_all_replicas(replicas: list[int]) -> None:
    """Also where shares are unequal, and where a replica has none of the last batch."""
    parts = run_ranks(sum(replicas), train_as_rank, replicas, STEPS, torch.float64, "adamw", "auto", 1, "levers")
    alone, totals = train_alone(STEPS, torch.float64, "adamw", network="levers")
    assert_same_but_for_rounding(parts, alone, totals)


def test_micro_batches_give_the_same_bits_in_stages_and_keep_replicas_alike() -> None:
    """The last batch of three is one part: two of them would be one sample, which has no variance."""
    alone, totals = train_alone(STEPS, torch.float32, "adamw", micro_batches=3)
    piped = run_ranks(2, train_as_rank, [1, 1], STEPS, torch.float32, "adamw", "shm", 3)
    for key, value in together(piped).items():
        assert np.array_equal(value, alone[key]), key
    assert totals_of(piped) == totals
    meshed = together(run_ranks(4, train_as_rank, [2, 2], STEPS, torch.float64, "adamw", "auto", 3))
    assert all(np.isfinite(value).all() for value in meshed.values())


def test_an_empty_share_has_gradients_of_zero() -> None:
    """What a replica without a sample adds to the sums of its stage."""
    x = torch.zeros(0, 3, 8, 8)
    for layer in a_stage(0, 3, torch.float32, "sgd").layers:
        layer.eval()  # torch's own batch norm cannot train on nothing; ours over replicas can
        update = local_forward_backward(layer, x, torch.zeros(0, dtype=torch.int64), count=3)
        assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())
        x = update.output
