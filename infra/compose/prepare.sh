#!/bin/bash
# Once, before `docker compose up`: passwords into .env, Ray's token and the folders that the containers share.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

word() { od -An -N24 -tx1 /dev/urandom | tr -d ' \n'; }

mkdir -p volumes/shared volumes/s3
if [ ! -e .env ]; then
    (
        umask 077
        for name in POSTGRES_PASSWORD S3_PASSWORD MLFLOW_PASSWORD MLFLOW_SESSION_KEY; do
            echo "$name=$(word)"
        done > .env
    )
fi
[ -e volumes/ray_token ] || (umask 077 && word > volumes/ray_token)
# The containers are user 1000, whoever you are.
if [ "$(id -u)" -ne 1000 ]; then
    chown -R 1000:1000 volumes || { echo "prepare.sh: run it as user 1000 or with sudo" >&2; exit 1; }
fi
