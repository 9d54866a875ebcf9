"""Ranks and shares: everybody has a place, and a batch that is cut and joined between stages stays whole."""

from __future__ import annotations

import itertools

import pytest

from orchestrator.data.loading.order import replica_slice
from orchestrator.pipeline.mesh import Mesh, cuts

MESHES = [m for n in (1, 2, 3) for m in itertools.product((1, 2, 3, 4), repeat=n)]
# A last batch of one sample joins the one before, so the largest batch need not divide into equal shares.
MOST = 25


@pytest.mark.parametrize("replicas", MESHES)
def test_ranks_and_places_are_inverse(replicas: tuple[int, ...]) -> None:
    mesh = Mesh(replicas)
    places = [mesh.place(rank) for rank in range(mesh.size)]
    assert sorted(places) == [(s, r) for s, count in enumerate(replicas) for r in range(count)]
    assert [mesh.rank(*place) for place in places] == list(range(mesh.size))
    assert places[0] == (0, 0), "rank 0 reads the first samples"
    with pytest.raises(ValueError, match=f"rank {mesh.size}"):
        mesh.place(mesh.size)


def test_pipelines_of_equal_stages_have_consecutive_ranks() -> None:
    mesh = Mesh((2, 2, 2))
    assert [mesh.place(r) for r in range(6)] == [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)]
    assert [mesh.before(r) for r in range(6)] == [[], [0], [1], [], [3], [4]]
    assert [mesh.after(r) for r in range(6)] == [[1], [2], [], [4], [5], []]


@pytest.mark.parametrize("replicas", [(2, 4), (4, 2), (3, 1, 2)])
def test_ranks_are_in_order_of_where_their_samples_begin(replicas: tuple[int, ...]) -> None:
    """What a replica is fed by has a rank near its own, so consecutive ranks of a node talk among themselves."""
    mesh = Mesh(replicas)
    begins = [replica_slice(0, 24, replica, replicas[stage])[0] for stage, replica in map(mesh.place, range(mesh.size))]
    assert begins == sorted(begins)


@pytest.mark.parametrize("replicas", MESHES)
@pytest.mark.parametrize("samples", [0, 1, 2, 7, 24, MOST])
def test_a_batch_passes_all_stages_in_order_without_loss_and_within_what_links_hold(
    replicas: tuple[int, ...], samples: int
) -> None:
    mesh = Mesh(replicas)
    limits = mesh.limits(MOST)
    assert limits[0] == -(-MOST // replicas[0])
    held = {mesh.rank(0, r): list(range(*replica_slice(0, samples, r, replicas[0]))) for r in range(replicas[0])}
    for stage in range(mesh.stages - 1):
        received: dict[int, list[int]] = {rank: [] for rank in mesh.stage_ranks(stage + 1)}
        for rank in mesh.stage_ranks(stage):
            borders = cuts(len(held[rank]), mesh.place(rank)[1], replicas[stage], replicas[stage + 1])
            for target, start, stop in zip(mesh.after(rank), borders[:-1], borders[1:], strict=True):
                assert rank in mesh.before(target)
                assert 0 <= stop - start <= mesh.link_limit(rank, target, limits[stage])
                received[target] += held[rank][start:stop]
        held = received
        assert [i for rank in mesh.stage_ranks(stage + 1) for i in held[rank]] == list(range(samples))
        assert all(len(own) <= limits[stage + 1] for own in held.values())
        if samples == 24:
            assert {len(own) for own in held.values()} == {24 // replicas[stage + 1]}, "shares are even"
