"""What every benchmark shares: machine facts, medians with ranges, one table, one JSON file."""

from __future__ import annotations

import json
import os
import platform
import random
import socket
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Processor, cores and versions that a ratio was measured with."""
    import torch

    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median with the range and the number of repetitions."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "n": len(values),
    }


def interval(ratios: Sequence[float]) -> dict[str, Any]:
    """Median of pairwise ratios with its bootstrap 95 % interval."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    return {"median": statistics.median(ratios), "low": medians[50], "high": medians[-51], "n": len(ratios)}


def shown(value: Any) -> str:
    """One cell of a table."""
    if isinstance(value, dict) and "low" in value:
        return f"{value['median']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
    if isinstance(value, dict) and "median" in value:
        return f"{value['median']:.3f} ({value['min']:.3f} to {value['max']:.3f})"
    if value is None:
        return "not measured"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def publish(name: str, command: str, title: str, rows: Sequence[dict[str, Any]], notes: Sequence[str]) -> None:
    """Print the table and write the JSON that docs/benchmarks.md is made from."""
    columns = list(rows[0])
    cells = [[shown(row[c]) for c in columns] for row in rows]
    widths = [max(len(c), *(len(line[i]) for line in cells)) for i, c in enumerate(columns)]
    print(f"\n{title}\n")
    for line in (columns, ["-" * w for w in widths], *cells):
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)))
    for note in notes:
        print(f"  {note}")
    RESULTS.mkdir(exist_ok=True)
    value = {
        "name": name,
        "command": command,
        "title": title,
        "machine": machine(),
        "rows": list(rows),
        "notes": list(notes),
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port
