"""Which way joins two workers, by where they are, and what cannot be joined."""

from __future__ import annotations

import pytest

from orchestrator.errors import JobError
from orchestrator.pipeline.connect import Place, choose_transport, refuse_shared_gpus
from orchestrator.pipeline.mesh import Mesh

HERE, THERE = Place("a"), Place("b")
GPU_0, GPU_1, OTHER_GPU = Place("a", "gpu-0"), Place("a", "gpu-1"), Place("b", "gpu-0")


def chosen(wanted: str, a: Place, b: Place, *, linux: bool = True, crowded: bool = False) -> str:
    return choose_transport(wanted, a, b, linux=linux, crowded=crowded)


def test_the_transport_is_chosen_by_where_the_ends_are() -> None:
    assert chosen("auto", HERE, HERE) == "shm"
    assert chosen("auto", HERE, THERE) == "gloo"
    assert chosen("auto", HERE, HERE, linux=False) == "gloo"
    assert chosen("gloo", HERE, HERE) == "gloo"
    assert chosen("auto", GPU_0, GPU_1) == "nccl"
    assert chosen("auto", GPU_0, OTHER_GPU) == "nccl"


def test_between_gpus_memory_of_the_hosts_serves_where_it_is_asked_for() -> None:
    assert chosen("shm", GPU_0, GPU_1) == "shm"
    assert chosen("gloo", GPU_0, GPU_1) == "gloo"


def test_workers_that_share_a_gpu_are_joined_through_memory_of_their_hosts() -> None:
    assert chosen("auto", GPU_0, GPU_0, crowded=True) == "shm"
    assert chosen("auto", GPU_0, OTHER_GPU, crowded=True) == "gloo"


def test_a_wish_that_cannot_be_is_refused() -> None:
    for ends in ((HERE, THERE), (GPU_0, OTHER_GPU)):
        with pytest.raises(JobError, match=r"cluster\.transport: shm joins workers of one Linux host only; use auto"):
            chosen("shm", *ends)
    with pytest.raises(JobError, match="nccl cannot join workers that share a GPU; use auto, or as many GPUs") as found:
        chosen("nccl", GPU_0, GPU_0, crowded=True)
    assert found.value.exit_code == 2


def test_stages_may_share_a_gpu_and_replicas_may_not() -> None:
    refuse_shared_gpus(Mesh((1, 1)), [GPU_0, GPU_0])
    refuse_shared_gpus(Mesh((2, 1)), [GPU_0, GPU_0, GPU_1])
    refuse_shared_gpus(Mesh((2,)), [HERE, HERE])
    with pytest.raises(JobError) as caught:
        refuse_shared_gpus(Mesh((1, 3)), [GPU_0, GPU_1, OTHER_GPU, GPU_1])
    assert str(caught.value) == (
        "cluster.workers: 4 workers have 3 GPUs, and two replicas of stage 1 (ranks 1 and 3) share one, which NCCL "
        "does not allow; use at most 3 workers, or stages without replicas (cluster.stages: 4)"
    )
    assert caught.value.exit_code == 2
