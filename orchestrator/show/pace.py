"""One sentence on what sets the pace of a run: data, network, links between workers or computing; and the remedy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

Event = Mapping[str, Any]

# Above this share of the time without images, data set the pace.
_WAITS = 0.1
# Above this share of the loader's time without shards, it is the network that it waits for.
_FETCHES = 0.5
# Below this share of the time, not even the busiest stage is what all wait for.
_BUSY = 0.7


def pace(events: Sequence[Event]) -> str | None:
    """What bounds the last attempt by the lines of its events.jsonl; None before its first epoch has ended."""
    starts = [i for i, event in enumerate(events) if event["event"] == "start"]
    epochs = [event for event in events[starts[-1] if starts else 0 :] if event["event"] == "epoch"]
    if not epochs:
        return None
    settled = epochs[1:] or epochs  # the first one contains the start
    wait = median(event["wait_input_fraction"][0] for event in settled)
    if wait >= _WAITS:
        return _by_data(wait, epochs[-1])
    busy = [median(stage) for stage in zip(*(event["busy_fraction"] for event in settled), strict=True)]
    slowest = max(range(len(busy)), key=busy.__getitem__)
    waiting = f"training waits {_percent(wait)} of its time for images"
    start = events[starts[-1]] if starts else {}
    workers, cores = start.get("workers"), start.get("cores")
    shared = workers is not None and cores is not None and workers > cores
    if busy[slowest] < _BUSY and shared:
        return (
            f"Bound by the cores of this machine: {workers} workers share {cores} of them, so each waits for its turn "
            f"and for the others' (no stage computes more than {_percent(busy[slowest])} of the time), {waiting}. As "
            "many workers as cores do the same work; more machines make it faster."
        )
    if busy[slowest] < _BUSY:
        return (
            f"Bound by the links between workers: no stage computes more than {_percent(busy[slowest])} of the time, "
            f"{waiting}. Larger batches, fewer stages, or workers nearer to one another."
        )
    stage = f"stage {slowest} computes" if len(busy) > 1 else "training computes"
    remedy = (
        "Every core of this machine has a worker: more machines make it faster, more workers here do not."
        if start.get("machine_full")
        else "More workers make it faster: orchestrator plan JOB --workers N."
    )
    return f"Bound by computing: {stage} {_percent(busy[slowest])} of the time, {waiting}. {remedy}"


def _by_data(wait: float, last: Event) -> str:
    loader, remote = last.get("loader"), last.get("remote")
    waiting = f"training waits {_percent(wait)} of its time for images"
    if remote and loader and remote["wait_s"] >= _FETCHES * loader["load_s"] > 0:
        share = _percent(min(1.0, remote["wait_s"] / loader["load_s"]))
        return (
            f"Bound by the network: {waiting}, and loading spends {share} of its own on waiting for shards. A larger "
            "data.cache.max_bytes, a store nearer by, or a local copy of the data."
        )
    decoding = ""
    if loader and loader["images"] and loader["decode_s"]:
        each = 1000 * loader["decode_s"] / loader["images"]
        decoding = f"; decoding takes {each:.2g} ms an image (loader threads of all workers: {loader['threads']})"
    return (
        f"Bound by data: {waiting}{decoding}. More data.loader_threads (or auto) and cores for them, or smaller images "
        "(orchestrator data pack --max-side)."
    )


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
