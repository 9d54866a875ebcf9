"""A job that leaves the number of micro-batches to the plan."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tests.conftest import Command
from tests.runs import layer_files


def test_a_run_that_leaves_it_to_the_plan_computes_its_batches_in_parts_under_a_limit_of_memory(
    tiny_job: Callable[..., Path], in_process: Command, tmp_path: Path
) -> None:
    """Batch norms take the statistics of a part, so the bits tell whether there were parts."""

    def trained(name: str, *settings: str) -> dict[str, str]:
        flags = [word for setting in ("train.epochs=1", *settings) for word in ("--set", setting)]
        result = in_process("run", tiny_job(name), *flags)
        assert result.returncode == 0, result.stderr
        return layer_files(tmp_path / "runs" / name)

    planned = tmp_path / "plan.json"
    stated = ("--set", "train.micro_batches=4", "--set", "data.expect={train_samples: 1797, classes: 10}")
    assert in_process("plan", tiny_job(), *stated, "--json", planned).returncode == 0
    needed_gb = json.loads(planned.read_text())["stages"][0]["memory_bytes"] / 1e9
    ample = trained("ample", "train.micro_batches=auto", f"cluster.memory_gb={1000 * needed_gb}")
    limited = trained("limited", "train.micro_batches=auto", f"cluster.memory_gb={1.0001 * needed_gb}")
    assert ample.keys() == limited.keys()
    assert all(limited[name] != ample[name] for name in ample)
