#!/bin/bash
# Without a container engine: the build steps of the Dockerfile in a plain Debian root made by debootstrap, as root.
# Then the quickstart, checked, as the image's user. Takes 10 to 20 minutes and 8 GB below FOLDER.
set -euo pipefail

[ $# -eq 1 ] || { echo "usage: rehearse.sh FOLDER (to be created; delete it afterwards)" >&2; exit 2; }
[ "$(id -u)" -eq 0 ] || { echo "rehearse.sh: must be run as root (chroot)" >&2; exit 2; }
command -v debootstrap > /dev/null || { echo "rehearse.sh: needs debootstrap (apt-get install debootstrap)" >&2; exit 2; }
[ ! -e "$1" ] || { echo "rehearse.sh: $1 is there already" >&2; exit 2; }
mkdir -p "$1"
root="$(cd "$1" && pwd)"
repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"

leave() {
    for place in dev/shm proc; do
        ! mountpoint -q "$root/$place" || umount "$root/$place"
    done
}
trap leave EXIT

debootstrap --variant=minbase bookworm "$root"
# What a container engine gives to a build: names of hosts, how to reach the registries, /proc and shared memory.
for file in /etc/resolv.conf /etc/hosts /etc/pip.conf /etc/apt/apt.conf.d; do
    [ ! -e "$file" ] || cp -rL "$file" "$root/$(dirname "$file")/"
done
mount -t proc proc "$root/proc"
mkdir -p "$root/dev/shm"
mount -t tmpfs -o size=1g tmpfs "$root/dev/shm"

# COPY, as far as .dockerignore lets it.
mkdir -p "$root/source/infra" "$root/opt"
for name in pyproject.toml constraints.txt README.md LICENSE hff orchestrator jobs infra/image infra/mlflow; do
    cp -r "$repository/$name" "$root/source/$name"
done
chroot "$root" bash /source/infra/image/install-system.sh --build
# Networks with a certificate of their own: what this machine trusts.
cp -L /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/ca-certificates.crt"
chroot "$root" bash /source/infra/image/install-python.sh /source /opt/orchestrator
cp -r "$repository/infra/mlflow" "$root/opt/mlflow"
cp -r "$repository/jobs" "$root/opt/jobs"

# USER 1000, and a job.
chroot --userspec=1000:1000 "$root" env -i HOME=/home/orchestrator PATH=/opt/orchestrator/bin:/usr/bin:/bin \
    bash -c 'cd && ray --version && orchestrator check /opt/jobs/quickstart.yaml &&
        orchestrator run /opt/jobs/quickstart.yaml --set runs=/shared/runs --set cluster.launcher=process --set train.epochs=1'
echo "The image's steps work in a plain Debian root: $root"
