#!/bin/bash
# As root, in a bare Debian: the packages of the image, and its user. With --build: what only building needs, too.
set -euo pipefail

# KubeRay's health checks call wget, Ray's cluster launcher copies files with rsync.
packages=(ca-certificates python3 rsync wget)
[ "${1:-}" != --build ] || packages+=(python3-venv)

export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends "${packages[@]}"
rm -rf /var/lib/apt/lists/*

if ! getent passwd 1000 > /dev/null; then
    groupadd --gid 1000 orchestrator
    useradd --uid 1000 --gid 1000 --create-home --home-dir /home/orchestrator --shell /bin/bash orchestrator
fi
mkdir -p /shared
chown 1000:1000 /shared
