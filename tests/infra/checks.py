"""Validators of what lies in infra/: each raises for a document that is not what it should be."""

from __future__ import annotations

import copy
from typing import Any

from tests.infra.schemas import COMPOSE, KUBERNETES, mapping, refuse_faults

CLOUDS = ("aws", "gcp")

NODE: dict[str, Any] = {
    "aws": mapping(
        {
            "InstanceType": {"type": "string", "pattern": r"^[a-z0-9]+\.[a-z0-9]+$"},
            "ImageId": {"type": "string", "pattern": "^ami-[0-9a-f]{17}$"},
            "SubnetIds": {"type": "array", "minItems": 1},
            "SecurityGroupIds": {"type": "array", "minItems": 1},
            "BlockDeviceMappings": {
                "type": "array",
                "items": mapping(
                    {
                        "DeviceName": {"type": "string"},
                        "Ebs": mapping(
                            {
                                "VolumeSize": {"type": "integer"},
                                "VolumeType": {"const": "gp3"},
                                "Encrypted": {"const": True},
                                "DeleteOnTermination": {"const": True},
                            }
                        ),
                    }
                ),
            },
            "MetadataOptions": mapping({"HttpTokens": {"const": "required"}}),
        },
        InstanceMarketOptions=mapping({"MarketType": {"const": "spot"}}),
    ),
    "gcp": mapping(
        {
            "machineType": {"type": "string"},
            "disks": {
                "type": "array",
                "items": mapping(
                    {
                        "boot": {"const": True},
                        "autoDelete": {"const": True},
                        "type": {"const": "PERSISTENT"},
                        "initializeParams": mapping(
                            {"diskSizeGb": {"type": "integer"}, "sourceImage": {"type": "string"}}
                        ),
                    }
                ),
            },
            "networkInterfaces": {"type": "array", "items": mapping({"subnetwork": {"type": "string"}})},
        },
        scheduling={
            "type": "array",
            "items": mapping({"preemptible": {"const": True}, "onHostMaintenance": {"const": "TERMINATE"}}),
        },
    ),
}
PROVIDER = mapping(
    {
        "type": {"enum": list(CLOUDS)},
        "region": {"type": "string"},
        "availability_zone": {"type": "string"},
        "use_internal_ips": {"const": True},
    },
    cache_stopped_nodes={"const": False},
    project_id={"type": "string"},
)


def check_ray_up(config: Any) -> None:
    """Ray's own defaults and validator, and the fields of the cloud, which Ray passes on unread."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    refuse_faults(config["provider"], PROVIDER)
    cloud = config["provider"]["type"]
    validate_config(prepare_config(copy.deepcopy(config)))
    # Of what Ray would fill in, nothing may be its: its dashboard listens everywhere, its wheels are the latest.
    for key in ("setup_commands", "head_setup_commands", "worker_setup_commands", "file_mounts", "idle_timeout_minutes",
                "head_start_ray_commands", "worker_start_ray_commands", "max_workers", "docker", "auth"):  # fmt: skip
        if key not in config:
            raise ValueError(f"{key} must be given")
    for node in config["available_node_types"].values():
        refuse_faults(node["node_config"], NODE[cloud])


def check_kubernetes(document: Any) -> None:
    refuse_faults(document, KUBERNETES[document["kind"]])


def check_compose(document: Any) -> None:
    refuse_faults(document, COMPOSE)
