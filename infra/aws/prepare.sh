#!/bin/bash
# Once: security group and shared file system on AWS, and cluster.mine.yaml with their ids.
#   prepare.sh REGION VPC SUBNET AMI IMAGE      (AMI: a Deep Learning Base AMI of the region; IMAGE: where you pushed ours)
set -euo pipefail

[ $# -eq 5 ] || { echo "usage: prepare.sh REGION VPC SUBNET AMI IMAGE" >&2; exit 2; }
export AWS_DEFAULT_REGION="$1"
vpc="$2" subnet="$3" ami="$4" image="$5"
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

# Only the nodes of this group reach one another; ssh comes from inside the VPC.
range="$(aws ec2 describe-vpcs --vpc-ids "$vpc" --query 'Vpcs[0].CidrBlock' --output text)"
group="$(aws ec2 create-security-group --group-name orchestrator --description "hff-orchestrator nodes" \
    --vpc-id "$vpc" --query GroupId --output text)"
aws ec2 authorize-security-group-ingress --group-id "$group" --protocol=-1 --source-group "$group" > /dev/null
aws ec2 authorize-security-group-ingress --group-id "$group" --protocol tcp --port 22 --cidr "$range" > /dev/null

files="$(aws efs create-file-system --encrypted --tags Key=Name,Value=orchestrator --query FileSystemId --output text)"
until [ "$(aws efs describe-file-systems --file-system-id "$files" --query 'FileSystems[0].LifeCycleState' --output text)" = available ]; do
    sleep 5
done
aws efs create-mount-target --file-system-id "$files" --subnet-id "$subnet" --security-groups "$group" > /dev/null
zone="$(aws ec2 describe-subnets --subnet-ids "$subnet" --query 'Subnets[0].AvailabilityZone' --output text)"

sed -e "s/us-west-2a/$zone/g" -e "s/us-west-2/$1/g" -e "s/ami-0\{17\}/$ami/g" -e "s/subnet-0\{17\}/$subnet/g" \
    -e "s/sg-0\{17\}/$group/g" -e "s/fs-0\{17\}/$files/g" -e "s#registry.example.org/[^ ]*#$image#g" \
    "$here/cluster.yaml" > "$here/cluster.mine.yaml"
echo "Written: $here/cluster.mine.yaml"
