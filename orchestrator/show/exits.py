"""The early exit of a network in the terminal: accuracy against compute."""

from __future__ import annotations

from typing import Any


def exits_table(exits: dict[str, Any]) -> str:
    """One line for each tolerated loss: its threshold and what came of it on the data."""
    layers = len(exits["curve"][0]["leaving"])
    lines = [
        f"  early exit, calibrated on {exits['calibrated_on']} held-out training images; in points and percent:",
        f"    {'tolerated':>9} {'threshold':>9} {'top-1':>7} {'lost':>6} {'compute':>8}  "
        f"leaving at layer 0 to {layers - 1}",
    ]
    for row in exits["curve"]:
        threshold = "never" if row["threshold"] is None else f"{row['threshold']:.4f}"
        leaving = " ".join(f"{100 * share:.1f}" for share in row["leaving"])
        lines.append(
            f"    {100 * row['tolerated']:>9.1f} {threshold:>9} {100 * row['top1']:>7.2f} {100 * row['lost']:>6.2f} "
            f"{100 * row['compute']:>8.1f}  {leaving}"
        )
    return "\n".join(lines)
