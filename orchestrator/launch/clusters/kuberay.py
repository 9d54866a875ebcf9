"""A job as a KubeRay RayJob: its own Ray cluster, of the size of the job, that ends with it."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import yaml

from orchestrator.errors import EXIT_DONE, JobError
from orchestrator.job import paths
from orchestrator.job.load import job_to_dict, job_yaml
from orchestrator.job.schema import Job
from orchestrator.job.search import SearchJob
from orchestrator.job.site import Site
from orchestrator.launch.clusters import outside
from orchestrator.launch.clusters.shape import Shape, shape_of
from orchestrator.launch.stop import stop_wait_s

JOB_FOLDER = "/job"
PART_OF = {"app.kubernetes.io/part-of": "hff-orchestrator"}
# The head runs Ray's own processes and the driver, which imports torch and waits.
_HEAD = {"cpu": "2", "memory": "8Gi"}
_SUBMITTER = {"cpu": "500m", "memory": "1Gi"}
_USER = 1000
_KEEP_S = 300

_CONTAINER_SECURITY = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
_POD_SECURITY = {
    "runAsNonRoot": True,
    "runAsUser": _USER,
    "runAsGroup": _USER,
    "fsGroup": _USER,
    "seccompProfile": {"type": "RuntimeDefault"},
}

Manifest = dict[str, Any]


def manifests(job: Job | SearchJob, site: Site, resume: str = "auto") -> tuple[Manifest, Manifest]:
    """The ConfigMap that holds the resolved job, and the RayJob that runs it.

    Raises JobError for a place of the job that the pods do not share.
    """
    _refuse_unshared(job, site.kuberay.mount)
    shape = shape_of(job, site)
    text = job_yaml(job)
    name = _dns_name(job.name)
    config = f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    labels = {**PART_OF, "hff-orchestrator/run": job.name[:63].rstrip("-._")}
    file = f"{name}.yaml"
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": config, "namespace": site.kuberay.namespace, "labels": labels},
        "immutable": True,
        "data": {file: text},
    }
    words = f"python -m orchestrator run {JOB_FOLDER}/{file}" + ("" if resume == "auto" else f" --resume {resume}")
    ray_job = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"generateName": f"{name}-", "namespace": site.kuberay.namespace, "labels": labels},
        "spec": {
            "entrypoint": words,
            "runtimeEnvYAML": yaml.safe_dump({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(stop_wait_s(job))}}),
            # A new cluster for each retry: the run goes on from its newest whole checkpoint.
            "backoffLimit": _max_failures(job),
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": _KEEP_S,
            "submissionMode": "K8sJobMode",
            "submitterPodTemplate": _submitter(site, labels),
            "rayClusterSpec": _cluster(site, shape, labels, config),
        },
    }
    return config_map, ray_job


def _cluster(site: Site, shape: Shape, labels: dict[str, str], config: str) -> Manifest:
    worker = {"cpu": str(shape.cpus), "memory": f"{shape.memory_gib}Gi"}
    if shape.gpus:
        worker["nvidia.com/gpu"] = str(shape.gpus)
    head_pod = _pod("ray-head", _HEAD, site, labels, config)
    head_pod["spec"]["containers"][0]["envFrom"] = [{"secretRef": {"name": "mlflow-client", "optional": True}}]
    worker_pod = _pod("ray-worker", worker, site, labels, config)
    if shape.gpus:
        worker_pod["spec"]["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    return {
        "rayVersion": version("ray"),
        "authOptions": {"mode": "token"},
        "headGroupSpec": {
            "serviceType": "ClusterIP",
            # No worker on the head: it would take a place that the job counts on.
            "rayStartParams": {"num-cpus": "0", "num-gpus": "0"},
            "template": head_pod,
        },
        "workerGroupSpecs": [
            {
                "groupName": "workers",
                "replicas": shape.nodes,
                "minReplicas": shape.nodes,
                "maxReplicas": shape.nodes,
                "rayStartParams": {},
                "template": worker_pod,
            }
        ],
    }


def _pod(container: str, resources: dict[str, str], site: Site, labels: dict[str, str], config: str) -> Manifest:
    mounts = [
        {"name": "shared", "mountPath": site.kuberay.mount},
        {"name": "shm", "mountPath": "/dev/shm"},
        {"name": "job", "mountPath": JOB_FOLDER, "readOnly": True},
    ]
    volumes = [
        {"name": "shared", "persistentVolumeClaim": {"claimName": site.kuberay.claim}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{site.shared_memory_gib}Gi"}},
        {"name": "job", "configMap": {"name": config}},
    ]
    pod = _secured(container, resources, site, labels)
    pod["spec"]["containers"][0]["env"] = [{"name": "RAY_USAGE_STATS_ENABLED", "value": "0"}]
    pod["spec"]["containers"][0]["volumeMounts"] = mounts
    pod["spec"]["volumes"] = volumes
    return pod


def _submitter(site: Site, labels: dict[str, str]) -> Manifest:
    pod = _secured("ray-job-submitter", _SUBMITTER, site, labels)
    pod["spec"]["restartPolicy"] = "Never"
    return pod


def _secured(container: str, resources: dict[str, str], site: Site, labels: dict[str, str]) -> Manifest:
    """A pod without root, without a token for the Kubernetes API, and with requests that equal its limits."""
    return {
        "metadata": {"labels": labels},
        "spec": {
            "automountServiceAccountToken": False,
            "securityContext": _POD_SECURITY,
            "containers": [
                {
                    "name": container,
                    "image": site.kuberay.image,
                    "resources": {"requests": resources, "limits": resources},
                    "securityContext": _CONTAINER_SECURITY,
                }
            ],
        },
    }


def _max_failures(job: Job | SearchJob) -> int:
    if isinstance(job, SearchJob):
        return int(job.base["cluster"]["max_failures"])
    return job.cluster.max_failures


def _refuse_unshared(job: Job | SearchJob, mount: str) -> None:
    found = [
        (key, f"must lie below {mount}, the storage that all pods share, got {place} (add --set {key}={mount}/...)")
        for key, place in _local_places(job)
        if os.path.commonpath([mount, place]) != mount
    ]
    if found:
        raise JobError(findings=found)


def _local_places(job: Job | SearchJob) -> Iterator[tuple[str, str]]:
    """Keys and absolute paths of what a job reads and writes."""
    values = job_to_dict(job)
    if not paths.is_store(values["runs"]):
        yield "runs", values["runs"]
    within = "base." if isinstance(job, SearchJob) else ""
    base = values["base"] if isinstance(job, SearchJob) else values
    named = {f"data.{key}": base["data"].get(key) for key in ("train", "val", "test")}
    named["model.pretrained"] = base["model"].get("pretrained")
    for key, place in named.items():
        if isinstance(place, str) and place.startswith("/"):
            yield within + key, place
    uri = values["tracking"]["uri"] or ""
    if paths.scheme(uri) == "sqlite":
        yield "tracking.uri", uri.removeprefix("sqlite:///")


def _dns_name(run: str) -> str:
    """A run's name in the letters of Kubernetes; KubeRay appends to it, up to 63 in all."""
    return re.sub(r"[^a-z0-9-]+", "-", run.lower())[:36].strip("-")


class _Dumper(yaml.SafeDumper):
    """Long texts as blocks, repeated values in full."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def manifest_text(*documents: Manifest) -> str:
    """Kubernetes objects as YAML documents."""
    return "---\n".join(yaml.dump(d, Dumper=_Dumper, sort_keys=False, width=110) for d in documents)


def submit_to_kuberay(job: Job | SearchJob, site: Site, *, resume: str, dry_run: bool) -> int:
    """Create the objects with kubectl, or print them; returns the exit code."""
    config_map, ray_job = manifests(job, site, resume)
    if dry_run:
        print(f"# {job.name} for KubeRay. Nothing was sent (--dry-run).")
        print(manifest_text(config_map, ray_job), end="")
        return EXIT_DONE
    namespace = site.kuberay.namespace
    instead = "or send it from elsewhere: orchestrator submit JOB --to kuberay --dry-run | kubectl create -f -"
    outside.call(["kubectl", "apply", "-f", "-"], manifest_text(config_map), instead=instead)
    created = outside.call(["kubectl", "create", "-f", "-", "-o", "name"], manifest_text(ray_job), instead=instead)
    name = created.rpartition("/")[2]
    print(
        f"Created RayJob {name} in namespace {namespace}\n"
        f"Log      kubectl -n {namespace} logs -f job/{name}\n"
        f"State    kubectl -n {namespace} get rayjob {name}\n"
        f"Stop     kubectl -n {namespace} delete rayjob {name}      (submit again to go on from the last checkpoint)"
    )
    return EXIT_DONE
