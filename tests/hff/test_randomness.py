"""Seeds: the same in every version, or a run would go on with other samples; apart for every use."""

from __future__ import annotations

import hashlib

import torch

from hff.randomness import derive_seed, seeded


def test_a_seed_is_the_upper_63_bits_of_a_hash_of_what_it_is_for() -> None:
    digest = hashlib.sha256(b"7\x1forder\x1f3\x1flayer").hexdigest()
    assert derive_seed(7, "order", 3, "layer") == int(digest[:16], 16) // 2


def test_neighbouring_uses_share_no_seed() -> None:
    uses = [(1, "a", 23), (1, "a", 2, 3), (12, "a", 3), (1, "a2", 3), (1, "a", 3, 2), (1, "a", 3), (1, "a")]
    assert len({derive_seed(*use) for use in uses}) == len(uses)


def test_a_seeded_block_leaves_the_generator_as_it_was() -> None:
    torch.manual_seed(1)
    expected = torch.randn(4)
    torch.manual_seed(1)
    with seeded(5):
        inside = torch.randn(4)
    assert torch.equal(torch.randn(4), expected)
    with seeded(5):
        assert torch.equal(torch.randn(4), inside)
