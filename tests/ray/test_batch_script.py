"""The Slurm script on this machine: two real Ray nodes; srun and scontrol are stand-ins of two lines."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from orchestrator.job.load import load_job
from orchestrator.job.site import Site
from orchestrator.launch.clusters.slurm import batch_script, run_words
from tests.conftest import ROOT, environment

SCONTROL = """\
#!/bin/bash
[ "$1" != show ] || { hostname; echo other; exit; }
echo "$@" >> "$HOME/scontrol.log"
"""
SRUN = """\
#!/bin/bash
while [[ "$1" == --* ]]; do shift; done
exec "$@"
"""


def started(script: str, home: Path) -> subprocess.Popen[str]:
    home.mkdir()
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN)):
        (home / name).write_text(text)
        (home / name).chmod(0o755)
    variables = {**environment(), "HOME": str(home), "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "x"}
    path = f"{home}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with (home / "log").open("w") as out:
        return subprocess.Popen(
            ["bash", "-c", script], cwd=ROOT, env=variables | {"PATH": path}, stdout=out, stderr=out, text=True
        )


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_job_whose_time_is_over_is_saved_and_queued_again_and_leaves_nothing(tmp_path: Path) -> None:
    overrides = [f"runs={tmp_path / 'runs'}", "train.epochs=200", "name=batch"]
    path = str(ROOT / "jobs" / "quickstart.yaml")
    site = Site.model_validate({"workers_per_node": 1, "slurm": {"setup": [":"]}})
    script = batch_script(load_job(path, overrides), site, run_words(path, overrides, "auto"))
    assert "#SBATCH --nodes=2" in script
    home = tmp_path / "home"
    process = started(script, home)
    progress = tmp_path / "runs" / "batch" / "progress.json"
    try:
        while not progress.exists():
            assert process.poll() is None, (home / "log").read_text()
            time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=300) == 75, (home / "log").read_text()
    finally:
        if process.poll() is None:
            process.kill()
    assert (home / "scontrol.log").read_text() == f"requeue {os.getpid()}\n"
    assert list((home / ".orchestrator").iterdir()) == [], "the token must not stay"
    assert list((tmp_path / "runs" / "batch" / "checkpoints").glob("step_*/manifest.json"))
    assert json.loads(progress.read_text())["step"] > 0
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert f"/tmp/ray-{os.getpid()}/" not in left
