"""What tests read of a run's folder, and how they wait for a run in another process."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

from safetensors.torch import load_file


def summary_of(run: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return summary


def newest(run: Path) -> Path:
    return sorted((run / "checkpoints").glob("step_*"))[-1]


def layer_files(run: Path) -> dict[str, str]:
    """Name and hash of every layer file of the newest checkpoint."""
    files = sorted(newest(run).glob("layer_*.safetensors"))
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def weights_sha256_of(run: Path) -> str:
    """What `weights_sha256` is to be, from the layer files of the newest checkpoint."""
    layers = []
    for path in sorted(newest(run).glob("layer_??.safetensors")):
        digest = hashlib.sha256()
        for name, tensor in sorted(load_file(path).items()):
            digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode() + tensor.numpy().tobytes())
        layers.append(digest.hexdigest())
    return hashlib.sha256("\n".join(layers).encode()).hexdigest()


def assert_same_bits(run: Path, other: Path) -> None:
    """Weights, order of consumption, accuracy and every byte of every layer file."""
    assert summary_of(run)["weights_sha256"] == weights_sha256_of(run)
    ours, theirs = summary_of(run), summary_of(other)
    for key in ("weights_sha256", "order_sha256", "sample_keys_sha256", "val_top1"):
        assert ours[key] == theirs[key], key
    assert layer_files(run) == layer_files(other)


def wait_for_step(run: Path, step: int, timeout_s: float = 120) -> None:
    """Wait until a run in another process has come that far."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        try:
            if json.loads((run / "progress.json").read_text())["step"] >= step:
                return
        except FileNotFoundError:
            pass
        time.sleep(0.05)
    raise AssertionError(f"{run.name} did not come to step {step} in {timeout_s} s")
