"""The benchmark against other schedules: every peer really trains, and memory and messages are counted right."""

from __future__ import annotations

import pytest
import torch

from benchmarks.memory import Held
from benchmarks.peers import Setting
from benchmarks.peers_table import LABELS, compare
from benchmarks.pipeline import SMOKE, measure

SMALL = Setting(layers=4, width=8, size=8, batch=32, micro_batches=(4,), timeout_s=60.0)


def test_memory_is_what_autograd_keeps_counted_once_per_storage() -> None:
    weight = torch.ones(100, requires_grad=True)
    x, y = torch.ones(100), torch.ones(50)
    with Held([weight]) as held:
        held.take(y)
        product = (x * weight) * x  # keeps x twice, weight and the first product
        assert held.peak_bytes == 4 * (50 + 100)
        product.sum().backward()
        del product
        (y * weight[:50]).sum().backward()
    assert held.peak_bytes == 4 * (50 + 100), "what is let go makes room"


@pytest.mark.slow
def test_peers_train_the_same_network_and_ours_holds_less_and_sends_half() -> None:
    rows, notes = compare(SMALL, 2, 0.05)
    table = {row["method"]: row for row in rows}
    assert not [note for note in notes if "not measured" in note]
    assert list(table)[:-1] == list(LABELS)
    assert all(row["images/s"]["n"] == 2 and row["images/s"]["min"] > 0 for row in rows)
    activation_mb = 4e-6 * 32 * 8 * 8 * 8
    ours, gpipe, ours_alone = (table[k] for k in ("local, 2 stages, gloo", "BP, 2 stages, GPipe", "local, one process"))
    assert gpipe["micro-batches"] == 4
    assert gpipe["sent per step, MB"] == pytest.approx(2 * activation_mb), "activations and their gradients"
    assert ours["sent per step, MB"] == pytest.approx(activation_mb, rel=0.1), "activations and labels"
    assert ours_alone["sent per step, MB"] == 0
    alike = "at micro-batches of 4"
    assert ours[alike] < gpipe[alike] / 2
    assert table["BP, 2 stages, 1F1B"][alike] < gpipe[alike]
    # A layer keeps its input, its norm's input and what goes on; the rest is its head's.
    assert 3 * activation_mb <= ours_alone["activations, MB"] < 4 * activation_mb


@pytest.mark.slow
def test_links_are_measured_against_the_ceiling_of_the_same_run() -> None:
    row = measure("smoke", "gloo", SMOKE, 0.0, 2, 0.05)
    assert row["activation, MB"] == pytest.approx(4e-6 * 16 * 8 * 8 * 8)
    assert row["of the ceiling"]["n"] == 2
    assert 0 < row["of the ceiling"]["low"] <= row["of the ceiling"]["high"]
    assert row["holds"] == "yes"
