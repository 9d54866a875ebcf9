#!/bin/bash
# Once: the shared file system on GCP, and cluster.mine.yaml with its address.
#   prepare.sh PROJECT ZONE BOOT_IMAGE IMAGE    (BOOT_IMAGE: a Deep Learning VM image; IMAGE: where you pushed ours)
set -euo pipefail

[ $# -eq 4 ] || { echo "usage: prepare.sh PROJECT ZONE BOOT_IMAGE IMAGE" >&2; exit 2; }
project="$1" zone="$2" boot="$3" image="$4"
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

gcloud filestore instances create orchestrator --project="$project" --zone="$zone" --tier=BASIC_SSD \
    --file-share=name=shared,capacity=2560GB --network=name=default
address="$(gcloud filestore instances describe orchestrator --project="$project" --zone="$zone" \
    --format='value(networks[0].ipAddresses[0])')"

sed -e "s/us-central1-a/$zone/g" -e "s/us-central1/${zone%-*}/g" -e "s/PROJECT/$project/g" \
    -e "s/images\/IMAGE/images\/$boot/g" -e "s/FILESTORE/$address/g" -e "s#registry.example.org/[^ ]*#$image#g" \
    "$here/cluster.yaml" > "$here/cluster.mine.yaml"
echo "Written: $here/cluster.mine.yaml"
