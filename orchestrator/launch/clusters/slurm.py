"""A job as a Slurm batch script: a Ray cluster of its own on the nodes of the allocation, ended with it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence

from orchestrator.errors import EXIT_DONE
from orchestrator.job.paths import base_folder
from orchestrator.job.schema import Job
from orchestrator.job.search import SearchJob
from orchestrator.job.site import Site
from orchestrator.launch.clusters import outside
from orchestrator.launch.clusters.shape import shape_of
from orchestrator.launch.stop import stop_wait_s

_BODY = """\
set -euo pipefail

{setup}

# Ray runs any code that reaches its ports, and these nodes have other users: a token of this job alone.
folder="$HOME/.orchestrator/slurm-$SLURM_JOB_ID"
mkdir -p "$folder"
chmod 700 "$folder"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$folder/token" RAY_USAGE_STATS_ENABLED=0
python -c 'import secrets; print(secrets.token_hex(32), end="")' > "$RAY_AUTH_TOKEN_PATH"
unset RAY_AUTH_TOKEN

# shellcheck disable=SC2329  # called by trap
finish() {{
    trap - EXIT
    local pids
    mapfile -t pids < <(jobs -p)
    [ "${{#pids[@]}}" -eq 0 ] || kill "${{pids[@]}}" 2> /dev/null || true
    wait || true
    rm -rf "$folder"
}}
trap finish EXIT

# This script runs on the first node, which is the head; no dashboard, no port that is not needed.
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head="${{nodes[0]}}"
port=$((20000 + SLURM_JOB_ID % 10000))
resources=(--num-cpus={cpus} --num-gpus={gpus})
ray start --head --block --port="$port" --include-dashboard=false --temp-dir="/tmp/ray-$SLURM_JOB_ID" \\
    "${{resources[@]}}" > "$folder/head.log" 2>&1 &
# A node that joins before the head listens gives up.
RAY_ADDRESS="127.0.0.1:$port" python -m orchestrator.launch.clusters.wait 1 "$!" > "$folder/address" ||
    {{ cat "$folder/head.log"; exit 1; }}
RAY_ADDRESS="$(cat "$folder/address"):$port"
export RAY_ADDRESS
if [ "${{#nodes[@]}}" -gt 1 ]; then
    others=$((${{#nodes[@]}} - 1))
    srun --nodes="$others" --ntasks="$others" --ntasks-per-node=1 --exclude="$head" \\
        ray start --block --address="$RAY_ADDRESS" "${{resources[@]}}" > "$folder/others.log" 2>&1 &
    python -m orchestrator.launch.clusters.wait "${{#nodes[@]}}" "$!" > "$folder/address" ||
        {{ cat "$folder/others.log"; exit 1; }}
fi

{command} &
driver=$!

# Slurm sends TERM before the time is over: save, then queue again. USR1 from you: save and end.
again=0
caught=0
trap 'again=1; caught=1; kill -TERM "$driver"' TERM
trap 'caught=1; kill -TERM "$driver"' USR1
code=0
wait "$driver" || code=$?
while [ "$caught" -eq 1 ]; do
    caught=0
    code=0
    wait "$driver" || code=$?
done
if [ "$code" -eq 75 ] && [ "$again" -eq 1 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def batch_script(job: Job | SearchJob, site: Site, command: Sequence[str]) -> str:
    """The script for sbatch that runs `command`, the words of `orchestrator run`, in the project's directory."""
    shape = shape_of(job, site)
    minutes = round(site.slurm.hours * 60)
    options = [
        f"--job-name={job.name}",
        f"--nodes={shape.nodes}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={shape.cpus}",
        *([f"--gpus-per-node={shape.gpus}"] if shape.gpus else []),
        f"--mem={shape.memory_gib}G",
        f"--time={minutes}",
        *([f"--partition={site.slurm.partition}"] if site.slurm.partition else []),
        *([f"--account={site.slurm.account}"] if site.slurm.account else []),
        f"--signal=B:TERM@{stop_wait_s(job)}",
        "--requeue",
        "--open-mode=append",
        "--output=%x-%j.log",
    ]
    lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in options), ""]
    body = _BODY.format(
        setup="\n".join(site.slurm.setup), cpus=shape.cpus, gpus=shape.gpus, command=shlex.join(command)
    )
    return "\n".join(lines) + body


def run_words(job_path: str, overrides: Sequence[str], resume: str) -> list[str]:
    """The job's command, in the directory that its relative paths start from."""
    words = ["python", "-m", "orchestrator", "run", os.path.relpath(os.path.abspath(job_path), base_folder(job_path))]
    for override in overrides:
        words += ["--set", override]
    return words + ([] if resume == "auto" else ["--resume", resume])


def submit_to_slurm(
    job: Job | SearchJob, site: Site, job_path: str, overrides: Sequence[str], *, resume: str, dry_run: bool
) -> int:
    """Give the script to sbatch, or print it; returns the exit code."""
    script = batch_script(job, site, run_words(job_path, overrides, resume))
    root = base_folder(job_path)
    if dry_run:
        print(script, end="")
        return EXIT_DONE
    instead = "run this on a login node, or there: orchestrator submit JOB --to slurm --dry-run > job.sh; sbatch job.sh"
    number = outside.call(["sbatch", "--parsable", f"--chdir={root}"], script, instead=instead).partition(";")[0]
    print(
        f"Submitted batch job {number}\n"
        f"Log      tail -F {root}/{job.name}-{number}.log\n"
        f"State    squeue -j {number}\n"
        f"Stop     scancel --batch --signal=USR1 {number}      (saves first; submit again to go on)"
    )
    return EXIT_DONE
