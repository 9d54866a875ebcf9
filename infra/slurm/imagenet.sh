#!/bin/bash
#SBATCH --job-name=imagenet
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=96
#SBATCH --gpus-per-node=8
#SBATCH --mem=68G
#SBATCH --time=1440
#SBATCH --partition=gpu
#SBATCH --account=vision
#SBATCH --signal=B:TERM@660
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

source .venv/bin/activate

# Ray runs any code that reaches its ports, and these nodes have other users: a token of this job alone.
folder="$HOME/.orchestrator/slurm-$SLURM_JOB_ID"
mkdir -p "$folder"
chmod 700 "$folder"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$folder/token" RAY_USAGE_STATS_ENABLED=0
python -c 'import secrets; print(secrets.token_hex(32), end="")' > "$RAY_AUTH_TOKEN_PATH"
unset RAY_AUTH_TOKEN

# shellcheck disable=SC2329  # called by trap
finish() {
    trap - EXIT
    local pids
    mapfile -t pids < <(jobs -p)
    [ "${#pids[@]}" -eq 0 ] || kill "${pids[@]}" 2> /dev/null || true
    wait || true
    rm -rf "$folder"
}
trap finish EXIT

# This script runs on the first node, which is the head; no dashboard, no port that is not needed.
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head="${nodes[0]}"
port=$((20000 + SLURM_JOB_ID % 10000))
resources=(--num-cpus=96 --num-gpus=8)
ray start --head --block --port="$port" --include-dashboard=false --temp-dir="/tmp/ray-$SLURM_JOB_ID" \
    "${resources[@]}" > "$folder/head.log" 2>&1 &
# A node that joins before the head listens gives up.
RAY_ADDRESS="127.0.0.1:$port" python -m orchestrator.launch.clusters.wait 1 "$!" > "$folder/address" ||
    { cat "$folder/head.log"; exit 1; }
RAY_ADDRESS="$(cat "$folder/address"):$port"
export RAY_ADDRESS
if [ "${#nodes[@]}" -gt 1 ]; then
    others=$((${#nodes[@]} - 1))
    srun --nodes="$others" --ntasks="$others" --ntasks-per-node=1 --exclude="$head" \
        ray start --block --address="$RAY_ADDRESS" "${resources[@]}" > "$folder/others.log" 2>&1 &
    python -m orchestrator.launch.clusters.wait "${#nodes[@]}" "$!" > "$folder/address" ||
        { cat "$folder/others.log"; exit 1; }
fi

python -m orchestrator run jobs/imagenet.yaml --set data.train=/shared/imagenet/train --set data.val=/shared/imagenet/val --set runs=/shared/runs &
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
