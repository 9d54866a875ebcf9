"""Two stages on two cores: what the links cost, and the same network under the schedules of others.

    python -m benchmarks.pipeline [--full] [--smoke]

Links: three modes take turns in the same two processes, one thread each: `pipeline` (stage 0 sends every activation
to stage 1), `ceiling` (both compute at the same time on batches of their own, nothing is sent) and `alone` (one
process computes both stages). Ratios are of images/s in steady state: filling the pipeline costs one stage's time
once per run and is left out. Peers: see benchmarks/peers.py and peers_table.py.
"""

from __future__ import annotations

import argparse
import uuid
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.common import interval, publish, spread
from benchmarks.crew import Calls, Crew, timed
from benchmarks.peers import CLASSES, STAGES, Setting, local_stage
from benchmarks.peers_table import compare
from orchestrator.pipeline.connect import open_links
from orchestrator.pipeline.links import LinkShape
from orchestrator.pipeline.mesh import Mesh
from orchestrator.pipeline.stage import StageInput

MODES = ("pipeline", "ceiling", "alone")
# Name, transport, network and batch, the part of the ceiling that is wanted.
REGIMES = (
    ("100 ms, 16 MB", "shm", Setting(layers=2, width=80, size=16, batch=205), 0.98),
    ("2 ms, 0.25 MB", "shm", Setting(layers=2, width=32, size=8, batch=32), 0.94),
    ("30 ms, 4 MB", "gloo", Setting(layers=2, width=112, size=16, batch=35), 0.92),
)
SMOKE = Setting(layers=2, width=8, size=8, batch=16, micro_batches=(2, 4))


def _answers(rank: int, setting: Setting, transport: str, token: str) -> Calls:
    """A stage with its link, one without, and all layers in one process."""
    link = LinkShape(setting.input_shape, torch.float32, setting.batch, CLASSES, "channels_last")
    receiver, sender = open_links(
        Mesh((1,) * STAGES),
        rank,
        link if rank else None,
        None if rank else link,
        transport=transport,
        timeout_s=setting.timeout_s,
        token=token,
    )
    x, target = setting.samples()
    mine = local_stage(setting, *setting.ranges[rank], receiver, sender)
    silent = local_stage(setting, *setting.ranges[rank])
    whole = local_stage(setting, 0, setting.layers - 1)

    def step(mode: str) -> None:
        if mode == "pipeline":
            mine.train_step(mine.receive() if rank else StageInput(0, x, target))
        elif mode == "ceiling":
            silent.train_step(StageInput(0, x, target))
        elif rank == 0:
            whole.train_step(StageInput(0, x, target))

    return {"time": lambda mode, steps: timed(lambda: step(mode), steps)}


def measure(
    name: str, transport: str, setting: Setting, wanted: float, windows: int, window_s: float
) -> dict[str, Any]:
    """One row: ratios of images/s over pairs of windows, each pair in the other order."""
    times: dict[str, list[float]] = {mode: [] for mode in MODES}
    with Crew(STAGES, _answers, setting, transport, uuid.uuid4().hex[:12]) as crew:
        steps = {mode: max(3, round(window_s / max(crew.call("time", mode, 8)))) for mode in MODES}
        for n in range(windows):
            for mode in MODES if n % 2 else MODES[::-1]:
                times[mode].append(max(crew.call("time", mode, steps[mode])))
    of_ceiling = interval([c / p for c, p in zip(times["ceiling"], times["pipeline"], strict=True)])
    return {
        "stage, activation": name,
        "transport": transport,
        "activation, MB": 4e-6 * setting.batch * torch.Size(setting.input_shape).numel(),
        "stage time, ms": spread([1e3 * t for t in times["ceiling"]]),
        "of the ceiling": of_ceiling,
        "wanted": wanted,
        "holds": "yes" if of_ceiling["high"] >= wanted else "no",
        "against one process": spread([a / p for a, p in zip(times["alone"], times["pipeline"], strict=True)]),
    }


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="20 windows of 5 s, 9 of the peers, instead of 6 of 1.5 s")
    parser.add_argument(
        "--smoke", action="store_true", help="a small network, a few steps of each mode; writes nothing"
    )
    parser.add_argument("--note", help="what a reader has to know of the machine meanwhile")
    arguments = parser.parse_args(words)
    if arguments.smoke:
        print(measure("smoke", "shm", SMOKE, 0.0, 2, 0.05), *compare(SMOKE, 2, 0.05)[0], sep="\n")
        return
    command = "python -m benchmarks.pipeline" + (" --full" if arguments.full else "")
    notes = [arguments.note] if arguments.note else []
    windows, window_s = (20, 5.0) if arguments.full else (6, 1.5)
    publish(
        "pipeline",
        command,
        "Two stages on two cores, one thread each",
        [measure(*regime, windows, window_s) for regime in REGIMES],
        [
            "ceiling: the same two stages at the same time without communication; steady state, without the fill",
            "of the ceiling: median of the ratios of neighbouring windows, with a bootstrap 95 % interval; it holds "
            "when the interval reaches what is wanted",
            *notes,
        ],
    )
    rows, remarks = compare(Setting(), *((9, 4.0) if arguments.full else (5, 1.5)))
    publish("pipeline_peers", command, "The pipeline and its peers, two cores", rows, [*remarks, *notes])


if __name__ == "__main__":
    # Under its own name, so that processes are forked from one that has imported it.
    from benchmarks import pipeline

    pipeline.main()
