"""The fields that the manifests of infra/ may have, each with its type; a field that is not here is refused.

Written from KubeRay 1.6 (ray.io/v1), Kubernetes 1.32 and the Compose specification, for what is used here.
"""

from __future__ import annotations

from typing import Any

import jsonschema

Schema = dict[str, Any]

TEXT: Schema = {"type": "string", "minLength": 1}
COUNT: Schema = {"type": "integer", "minimum": 0}
PORT: Schema = {"type": "integer", "minimum": 1, "maximum": 65535}
BOOL: Schema = {"type": "boolean"}
TEXTS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
QUANTITY: Schema = {"type": "string", "pattern": r"^[0-9]+(m|Mi|Gi|Ti)?$"}
NAME: Schema = {"type": "string", "pattern": r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"}


def one_of(*values: Any) -> Schema:
    return {"enum": list(values)}


def listed(item: Schema) -> Schema:
    return {"type": "array", "items": item}


def mapping(required: dict[str, Schema], **optional: Schema) -> Schema:
    return {
        "type": "object",
        "required": list(required),
        "properties": {**required, **optional},
        "additionalProperties": False,
    }


METADATA = mapping({}, name=NAME, generateName={"type": "string", "pattern": r"^[a-z0-9-]{1,40}-$"}, namespace=NAME,
                   labels=TEXTS)  # fmt: skip
POD_SECURITY = mapping(
    {
        "runAsNonRoot": one_of(True),
        "runAsUser": {"type": "integer", "minimum": 1},
        "runAsGroup": {"type": "integer", "minimum": 1},
        "fsGroup": {"type": "integer", "minimum": 1},
        "seccompProfile": mapping({"type": one_of("RuntimeDefault")}),
    }
)
CONTAINER_SECURITY = mapping(
    {"allowPrivilegeEscalation": one_of(False), "capabilities": mapping({"drop": {"const": ["ALL"]}})}
)
RESOURCES = {
    "type": "object",
    "required": ["cpu", "memory"],
    "properties": {"cpu": QUANTITY, "memory": QUANTITY, "nvidia.com/gpu": QUANTITY},
    "additionalProperties": False,
}
SECRET_KEY = mapping({"secretKeyRef": mapping({"name": NAME, "key": TEXT})})
CONTAINER = mapping(
    {
        "name": NAME,
        "image": {"type": "string", "pattern": r"^[^:]+(:[0-9]+/[^:]+)?(:(?!latest$)[\w.-]+|@sha256:[0-9a-f]{64})$"},
        "resources": mapping({"requests": RESOURCES, "limits": RESOURCES}),
        "securityContext": CONTAINER_SECURITY,
    },
    command=listed(TEXT),
    env=listed({"oneOf": [mapping({"name": TEXT, "value": TEXT}), mapping({"name": TEXT, "valueFrom": SECRET_KEY})]}),
    envFrom=listed(mapping({"secretRef": mapping({"name": NAME}, optional=BOOL)})),
    ports=listed(mapping({"name": NAME, "containerPort": PORT})),
    volumeMounts=listed(mapping({"name": NAME, "mountPath": TEXT}, readOnly=BOOL)),
)
VOLUME = {
    "oneOf": [
        mapping({"name": NAME, "persistentVolumeClaim": mapping({"claimName": NAME})}),
        mapping({"name": NAME, "emptyDir": mapping({"medium": one_of("Memory"), "sizeLimit": QUANTITY})}),
        mapping({"name": NAME, "configMap": mapping({"name": NAME})}),
    ]
}
POD = mapping(
    {
        "metadata": METADATA,
        "spec": mapping(
            {
                "automountServiceAccountToken": one_of(False),
                "securityContext": POD_SECURITY,
                "containers": {**listed(CONTAINER), "minItems": 1, "maxItems": 1},
            },
            restartPolicy=one_of("Never"),
            volumes=listed(VOLUME),
            tolerations=listed(mapping({"key": TEXT, "operator": one_of("Exists"), "effect": one_of("NoSchedule")})),
        ),
    }
)
# `ray start` as KubeRay calls it: only what is used here.
RAY_START = mapping({}, **{"num-cpus": {"const": "0"}, "num-gpus": {"const": "0"}})
RAY_CLUSTER_SPEC = mapping(
    {
        "rayVersion": TEXT,
        "authOptions": mapping({"mode": one_of("token")}),
        "headGroupSpec": mapping(
            {"serviceType": one_of("ClusterIP"), "rayStartParams": RAY_START, "template": POD},
        ),
        "workerGroupSpecs": listed(
            mapping(
                {
                    "groupName": NAME,
                    "replicas": COUNT,
                    "minReplicas": COUNT,
                    "maxReplicas": COUNT,
                    "rayStartParams": RAY_START,
                    "template": POD,
                }
            )
        ),
    }
)


def kind(api: str, name: str, **fields: Schema) -> Schema:
    return mapping({"apiVersion": one_of(api), "kind": one_of(name), "metadata": METADATA, **fields})


LABELS = mapping({"matchLabels": TEXTS})
PEER = {
    "oneOf": [
        mapping({"podSelector": LABELS}),
        mapping({"namespaceSelector": LABELS}),
        mapping({"ipBlock": mapping({"cidr": TEXT, "except": listed(TEXT)})}),
    ]
}
NET_PORTS = listed(mapping({"protocol": one_of("TCP", "UDP"), "port": PORT}))
CLAIM = mapping(
    {
        "accessModes": listed(one_of("ReadWriteMany", "ReadWriteOnce")),
        "resources": mapping({"requests": mapping({"storage": QUANTITY})}),
    },
    storageClassName=NAME,
)
KUBERNETES: dict[str, Schema] = {
    "RayJob": kind(
        "ray.io/v1",
        "RayJob",
        spec=mapping(
            {
                "entrypoint": TEXT,
                "runtimeEnvYAML": TEXT,
                "backoffLimit": COUNT,
                "shutdownAfterJobFinishes": one_of(True),
                "ttlSecondsAfterFinished": COUNT,
                "submissionMode": one_of("K8sJobMode"),
                "submitterPodTemplate": POD,
                "rayClusterSpec": RAY_CLUSTER_SPEC,
            }
        ),
    ),
    "RayCluster": kind("ray.io/v1", "RayCluster", spec=RAY_CLUSTER_SPEC),
    "ConfigMap": kind("v1", "ConfigMap", immutable=one_of(True), data=TEXTS),
    "Namespace": kind("v1", "Namespace"),
    "NetworkPolicy": kind(
        "networking.k8s.io/v1",
        "NetworkPolicy",
        spec=mapping(
            {
                "podSelector": {"const": {}},
                "policyTypes": {"const": ["Ingress", "Egress"]},
                "ingress": listed(mapping({"from": listed(PEER)}, ports=NET_PORTS)),
                "egress": listed(mapping({"to": listed(PEER)}, ports=NET_PORTS)),
            }
        ),
    ),
    "PersistentVolumeClaim": kind("v1", "PersistentVolumeClaim", spec=CLAIM),
    "Service": kind(
        "v1",
        "Service",
        spec=mapping(
            {
                "type": one_of("ClusterIP"),
                "selector": TEXTS,
                "ports": listed(mapping({"name": NAME, "port": PORT, "targetPort": PORT})),
            }
        ),
    ),
    "Deployment": kind(
        "apps/v1",
        "Deployment",
        spec=mapping(
            {
                "replicas": COUNT,
                "strategy": mapping({"type": one_of("Recreate")}),
                "selector": LABELS,
                "template": POD,
            }
        ),
    ),
    "StatefulSet": kind(
        "apps/v1",
        "StatefulSet",
        spec=mapping(
            {
                "serviceName": NAME,
                "replicas": COUNT,
                "selector": LABELS,
                "template": POD,
                "volumeClaimTemplates": listed(mapping({"metadata": METADATA, "spec": CLAIM})),
            }
        ),
    ),
}

DEPENDS = {
    "type": "object",
    "additionalProperties": mapping(
        {"condition": one_of("service_started", "service_healthy", "service_completed_successfully")}
    ),
}
SERVICE = mapping(
    {
        "image": {"type": "string", "pattern": r":(?!latest$)[\w.-]+$"},
        "user": {"type": "string", "pattern": r"^(1000:1000|postgres)$"},
        "networks": listed(one_of("cluster")),
        "security_opt": {"const": ["no-new-privileges:true"]},
    },
    command=TEXT,
    environment=TEXTS,
    secrets=listed(TEXT),
    volumes=listed(TEXT),
    shm_size=TEXT,
    restart=one_of("unless-stopped"),
    cap_drop={"const": ["ALL"]},
    ports=listed({"type": "string", "pattern": r"^127\.0\.0\.1:[0-9]+:[0-9]+$"}),
    deploy=mapping({"replicas": COUNT}),
    depends_on=DEPENDS,
    healthcheck=mapping({"test": listed(TEXT), "interval": TEXT, "retries": COUNT}),
)
COMPOSE = mapping(
    {
        "name": NAME,
        "services": {"type": "object", "additionalProperties": SERVICE},
        "networks": mapping({"cluster": {"const": {}}}),
        "volumes": {"type": "object", "additionalProperties": {"const": {}}},
        "secrets": {"type": "object", "additionalProperties": mapping({"file": TEXT})},
    },
    **{"x-node": {"type": "object"}},
)


def refuse_faults(document: Any, schema: Schema) -> None:
    """Raises jsonschema.ValidationError for the first field that the schema does not know or allow."""
    for fault in jsonschema.Draft202012Validator(schema).iter_errors(document):
        raise fault
