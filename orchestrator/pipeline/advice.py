"""Which stage holds the others up, and what would help. Pure; no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Below these a stage is as fast as the others, the data are fast enough, a change is not worth it.
_UNEVEN, _STARVED, _WORTH_IT = 1.1, 0.1, 1.05


@dataclass(frozen=True)
class StageTime:
    """Seconds of a stage over some steps, the mean of its replicas.

    `layer_s` are those of its layers, updates included. `all_reduce_s` is what the replicas wait for one another: sums
    of gradients, of batch norms and of counts.
    """

    layers: tuple[int, int]
    replicas: int
    wall_s: float = 0.0
    wait_input_s: float = 0.0
    wait_output_s: float = 0.0
    all_reduce_s: float = 0.0
    layer_s: tuple[float, ...] = ()

    @property
    def work_s(self) -> float:
        """What it would take with input always there and output always taken."""
        return max(0.0, self.wall_s - self.wait_input_s - self.wait_output_s)

    @property
    def busy_s(self) -> float:
        return max(0.0, self.work_s - self.all_reduce_s)

    def fraction(self, seconds: float) -> float:
        return seconds / max(self.wall_s, 1e-9)

    def plus(self, other: StageTime) -> StageTime:
        """Both together."""
        layer_s = self.layer_s or (0.0,) * len(other.layer_s)
        return StageTime(
            self.layers,
            self.replicas,
            self.wall_s + other.wall_s,
            self.wait_input_s + other.wait_input_s,
            self.wait_output_s + other.wait_output_s,
            self.all_reduce_s + other.all_reduce_s,
            tuple(a + b for a, b in zip(layer_s, other.layer_s, strict=True)),
        )


@dataclass(frozen=True)
class Advice:
    """The stage that sets the pace, and a sentence on it with the remedy."""

    stage: int
    text: str


def advise(
    stages: Sequence[StageTime], batch: int, layer_names: Sequence[str], cores: int | None = None
) -> Advice | None:
    """Name the stage that holds the others up; None where they are even and have their data in time.

    More workers than `cores`, those of the only machine, are not advised.
    """
    full = cores is not None and sum(stage.replicas for stage in stages) >= cores
    starved = stages[0].fraction(stages[0].wait_input_s)
    if starved > _STARVED:
        return Advice(
            0,
            f"Stage 0 waits for images {100 * starved:.0f} % of the time: reading and decoding set the pace "
            f"(data.loader_threads, smaller images in the shards{'' if full else ', a replica more of stage 0'}).",
        )
    work = [stage.work_s for stage in stages]
    slow = max(range(len(stages)), key=work.__getitem__)
    if len(stages) == 1 or work[slow] < _UNEVEN * sum(work) / len(work):
        return None
    others = [stage.fraction(stage.work_s) for i, stage in enumerate(stages) if i != slow]
    first, last = stages[slow].layers
    names = layer_names[first] if first == last else f"{layer_names[first]} .. {layer_names[last]}"
    return Advice(
        slow,
        f"Stage {slow} ({names}) sets the pace: it works {100 * stages[slow].fraction(work[slow]):.0f} % of the time, "
        f"the others {100 * sum(others) / len(others):.0f} %. {_remedy(stages, slow, batch, layer_names, full)}",
    )


def _remedy(stages: Sequence[StageTime], slow: int, batch: int, layer_names: Sequence[str], full: bool) -> str:
    """A layer to a neighbour, or else a replica more; with the rate that it would give."""
    now = stages[slow].work_s
    moves = [(_after_move(stages, slow, to), to) for to in (slow - 1, slow + 1) if 0 <= to < len(stages)]
    best, to = min(moves, default=(now, slow))
    if now / best >= _WORTH_IT:
        layer = stages[slow].layers[0 if to < slow else 1]
        counts = [stage.layers[1] - stage.layers[0] + 1 for stage in stages]
        counts[slow], counts[to] = counts[slow] - 1, counts[to] + 1
        return (
            f"Move layer {layer} ({layer_names[layer]}) to stage {to} (cluster.layers: {counts}): "
            f"about {now / best:.2f}x the images/s."
        )
    if full:
        return "All cores of this machine have a worker: more workers need more machines."
    more = next((r for r in range(stages[slow].replicas + 1, batch + 1) if batch % r == 0), None)
    if more is None:
        return "A larger train.global_batch_size would let it have replicas."
    replicas = [stage.replicas for stage in stages]
    replicas[slow] = more
    if stages[slow].all_reduce_s > stages[slow].busy_s:
        return "It mostly waits for sums over its replicas: fewer of them, a larger batch or a faster link would help."
    after = max(_with_replicas(stages[slow], more), *(s.work_s for i, s in enumerate(stages) if i != slow))
    return (
        f"Give it {more} replicas (cluster.workers: {sum(replicas)}, cluster.replicas: {replicas}): "
        f"at most {now / after:.2f}x the images/s."
    )


def _after_move(stages: Sequence[StageTime], slow: int, to: int) -> float:
    """The slowest stage's time when a neighbour takes the layer next to it."""
    if len(stages[slow].layer_s) < 2:
        return stages[slow].work_s
    moved = stages[slow].layer_s[0 if to < slow else -1]
    taken = moved * stages[slow].replicas / stages[to].replicas
    rest = (s.work_s for i, s in enumerate(stages) if i not in (slow, to))
    return max(stages[slow].work_s - moved, stages[to].work_s + taken, *rest)


def _with_replicas(stage: StageTime, more: int) -> float:
    return stage.busy_s * stage.replicas / more + stage.all_reduce_s
