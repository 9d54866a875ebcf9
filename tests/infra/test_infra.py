"""What lies in infra/ is valid, fits the jobs and this version, and opens nothing to anybody. No cloud is asked."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from orchestrator.cli import main
from orchestrator.job.load import load_job
from orchestrator.job.site import load_site
from tests.conftest import ROOT
from tests.infra.checks import CLOUDS, check_compose, check_kubernetes, check_ray_up

INFRA = ROOT / "infra"
FILES = sorted(
    ROOT / name
    for name in subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "infra"],
        capture_output=True, text=True, check=True,
    ).stdout.split()
)  # fmt: skip
SCRIPTS = [path for path in FILES if path.suffix == ".sh"]
KUBERAY = ("namespace", "mlflow", "rayjob", "raycluster")
IMAGENET = ("data.train=/shared/imagenet/train", "data.val=/shared/imagenet/val", "runs=/shared/runs")
SETS = [word for override in IMAGENET for word in ("--set", override)]
TOKEN = "RAY_AUTH_MODE=token"
# Below these keys the names are ours to choose.
FREE = {
    "labels", "matchLabels", "selector", "data", "environment", "services", "volumes", "secrets", "depends_on",
    "available_node_types", "resources", "file_mounts", "x-node",
}  # fmt: skip

Check = Callable[[Any], None]


def constraint(package: str) -> str:
    found = re.search(rf"^{package}==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found is not None
    return found.group(1)


def name_of(path: Path) -> str:
    return str(path.relative_to(INFRA))


def documents(path: Path) -> list[Any]:
    return list(yaml.safe_load_all(path.read_text()))


YAML_FILES: list[tuple[Path, Check]] = [
    *((INFRA / cloud / "cluster.yaml", check_ray_up) for cloud in CLOUDS),
    *((INFRA / "kuberay" / f"{name}.yaml", check_kubernetes) for name in KUBERAY),
    (INFRA / "compose" / "compose.yaml", check_compose),
]
SITES = (INFRA / "kuberay" / "site.yaml", INFRA / "slurm" / "site.yaml")

pytestmark = pytest.mark.filterwarnings("ignore")  # of Ray's own imports


@pytest.mark.parametrize(("path", "check"), YAML_FILES, ids=lambda v: name_of(v) if isinstance(v, Path) else "")
def test_every_manifest_is_valid(path: Path, check: Check) -> None:
    for document in documents(path):
        check(document)


def keys_of(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            free = path and path[-1] in FREE and key != "matchLabels"
            if not free or (path[-1] == "resources" and path[0] != "available_node_types"):
                yield (*path, key)
            yield from keys_of(inner, (*path, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from keys_of(inner, (*path, number))


def with_typo(document: Any, path: tuple[Any, ...]) -> Any:
    wrong = copy.deepcopy(document)
    owner = wrong
    for key in path[:-1]:
        owner = owner[key]
    owner[f"{path[-1]}x"] = owner.pop(path[-1])
    return wrong


def caught(document: Any, check: Check) -> bool:
    try:
        check(document)
    except (jsonschema.ValidationError, ValueError, KeyError, AssertionError):  # Ray asserts, too
        return True
    return False


@pytest.mark.parametrize(("path", "check"), YAML_FILES, ids=lambda v: name_of(v) if isinstance(v, Path) else "")
def test_a_typo_in_any_key_of_a_manifest_is_caught(path: Path, check: Check) -> None:
    missed = [
        ".".join(map(str, keys))
        for document in documents(path)
        for keys in dict.fromkeys(keys_of(document))
        if "x-node" not in keys and not caught(with_typo(document, keys), check)
    ]
    assert not missed


@pytest.mark.parametrize("path", [path for path, _ in YAML_FILES], ids=name_of)
def test_no_manifest_is_empty(path: Path) -> None:
    assert all(len(list(keys_of(document))) > 3 for document in documents(path))


@pytest.mark.parametrize("path", SITES, ids=name_of)
def test_site_files_are_valid_and_a_typo_in_any_key_is_caught(path: Path, tmp_path: Path) -> None:
    from orchestrator.errors import JobError

    load_site(path)
    wrong = tmp_path / "site.yaml"
    for keys in keys_of(documents(path)[0]):
        wrong.write_text(yaml.safe_dump(with_typo(documents(path)[0], keys)))
        with pytest.raises(JobError, match=f"{keys[-1]}x"):
            load_site(wrong)


# --- scripts


def shellcheck(text: str) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("shellcheck")
    # The environment that a script activates is not there to be read.
    words = [str(program), "--shell=bash", "--severity=style", "--exclude=SC1091", "-"]
    return subprocess.run(words, input=text, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_scripts_pass_shellcheck_and_stop_at_the_first_failure(path: Path) -> None:
    text = path.read_text()
    done = shellcheck(text)
    assert done.returncode == 0, done.stdout
    assert "set -euo pipefail" in text


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_a_slip_in_a_script_is_caught(path: Path) -> None:
    assert shellcheck(path.read_text() + 'if [ "$x" = y ; then z; fi\n').returncode != 0


# --- image

DOCKERFILE = INFRA / "image" / "Dockerfile"
INSTRUCTIONS = {"ARG", "FROM", "COPY", "RUN", "ENV", "USER", "WORKDIR", "CMD"}


def check_dockerfile(text: str, ignore: str) -> None:
    """Known instructions, what is copied exists and is let through, the last user is not root. Raises ValueError."""
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line.strip() and not line.startswith("#")]
    allowed = [line[1:] for line in ignore.splitlines() if line.startswith("!")]
    for line in lines:
        word, _, rest = line.partition(" ")
        if word not in INSTRUCTIONS:
            raise ValueError(f"unknown instruction {word}")
        if word == "COPY" and not rest.startswith("--from=build "):
            source = rest.split()[0]
            if not (ROOT / source).exists():
                raise ValueError(f"no such file {source}")
            if source != "." and not any(source == a or source.startswith(a + "/") for a in allowed):
                raise ValueError(f"{source} is not let through by .dockerignore")
        for script in re.findall(r"bash (/\S+)", rest):
            if not (INFRA / "image" / Path(script).name).is_file():
                raise ValueError(f"no such script {script}")
    if [line for line in lines if line.startswith("USER")][-1:] != ["USER 1000:1000"]:
        raise ValueError("the image must not run as root")
    if sum(line.startswith("FROM") for line in lines) < 2:
        raise ValueError("the image must not carry what only building needs")
    for name in allowed:
        if not (ROOT / name).exists():
            raise ValueError(f".dockerignore names {name}, which is not there")


IGNORE = DOCKERFILE.with_name("Dockerfile.dockerignore")


def test_the_image_is_built_from_what_is_there_and_runs_as_no_root() -> None:
    check_dockerfile(DOCKERFILE.read_text(), IGNORE.read_text())


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("RUN bash", "RUM bash"),
        ("COPY infra/mlflow", "COPY infra/mlfow"),
        ("install-system.sh --build", "install-sytem.sh --build"),
        ("USER 1000:1000\n", ""),
        ("USER 1000:1000", "USER 0:0"),
        ("COPY jobs", "COPY docs"),
    ],
)
def test_a_typo_in_the_dockerfile_is_caught(right: str, wrong: str) -> None:
    assert right in DOCKERFILE.read_text()
    with pytest.raises(ValueError):
        check_dockerfile(DOCKERFILE.read_text().replace(right, wrong), IGNORE.read_text())


def test_data_secrets_and_git_cannot_get_into_the_image() -> None:
    lines = [line for line in IGNORE.read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*", "nothing gets in that is not named"
    assert not {"!.git", "!data", "!runs", "!.env", "!.venv"} & set(lines)


# --- cross-checks


def imagenet() -> Any:
    return load_job(ROOT / "jobs" / "imagenet.yaml", IMAGENET)


@pytest.mark.parametrize("name", ["rayjob", "raycluster"])
def test_kuberay_files_have_our_ray_and_the_resources_of_the_imagenet_job(name: str) -> None:
    spec = documents(INFRA / "kuberay" / f"{name}.yaml")[-1]["spec"]
    cluster = spec.get("rayClusterSpec", spec)
    assert cluster["rayVersion"] == constraint("ray")
    (group,) = cluster["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    job = imagenet().cluster
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"]
    assert group["replicas"] * int(limits["nvidia.com/gpu"]) == job.workers
    assert group["replicas"] * int(limits["cpu"]) == job.workers * job.cpus_per_worker


@pytest.mark.parametrize("name", ["rayjob", "raycluster"])
def test_all_pods_of_a_ray_cluster_share_the_storage_and_have_shared_memory(name: str) -> None:
    spec = documents(INFRA / "kuberay" / f"{name}.yaml")[-1]["spec"]
    cluster = spec.get("rayClusterSpec", spec)
    claim = next(d for d in documents(INFRA / "kuberay" / "namespace.yaml") if d["kind"] == "PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        mounts = {m["name"]: m["mountPath"] for m in pod["containers"][0]["volumeMounts"]}
        claims = [v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "persistentVolumeClaim" in v]
        assert claims == [claim["metadata"]["name"]]
        assert mounts["shared"] == "/shared" and mounts["shm"] == "/dev/shm"


@pytest.mark.parametrize("cloud", CLOUDS)
def test_clouds_hold_the_imagenet_job_with_spot_workers_and_shared_storage(cloud: str) -> None:
    config = documents(INFRA / cloud / "cluster.yaml")[0]
    head, worker = config["available_node_types"]["head"], config["available_node_types"]["gpu-worker"]
    job = imagenet().cluster
    assert worker["min_workers"] == worker["max_workers"] == config["max_workers"]
    assert worker["min_workers"] * worker["resources"]["GPU"] == job.workers
    assert worker["min_workers"] * worker["resources"]["CPU"] == job.workers * job.cpus_per_worker
    assert head["resources"]["CPU"] == 0
    market = {"aws": "InstanceMarketOptions", "gcp": "scheduling"}[cloud]
    assert market in worker["node_config"] and market not in head["node_config"]
    for node in (head, worker):
        assert any("mount -t nfs" in command and "/shared" in command for command in node["initialization_commands"])
    assert "--volume /shared:/shared" in config["docker"]["run_options"]


@pytest.mark.parametrize("cloud", CLOUDS)
def test_clouds_start_ray_with_a_token_and_the_dashboard_on_loopback(cloud: str) -> None:
    config = documents(INFRA / cloud / "cluster.yaml")[0]
    starts = [c for c in config["head_start_ray_commands"] + config["worker_start_ray_commands"] if "ray start" in c]
    assert len(starts) == 2 and all(TOKEN in command for command in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert any(place.endswith(".ray/auth_token") for place in config["file_mounts"])
    assert config["provider"]["use_internal_ips"] is True


def test_compose_nodes_have_a_token_and_only_loopback_is_published() -> None:
    services = documents(INFRA / "compose" / "compose.yaml")[0]["services"]
    for name in ("head", "worker"):
        assert services[name]["environment"]["RAY_AUTH_MODE"] == "token"
        assert services[name]["secrets"] == ["ray_token"]
        assert services[name]["volumes"] == ["./volumes/shared:/shared"]
    published = [port for service in services.values() for port in service.get("ports", [])]
    assert len(published) == 2 and all(port.startswith("127.0.0.1:") for port in published)


def test_our_image_has_one_tag_in_all_files() -> None:
    tags = {
        found
        for path in FILES
        if path.suffix != ".md" or path.parent.name == "image"
        for found in re.findall(r"hff-orchestrator:([\w.]+)", path.read_text())
    }
    assert len(tags) == 1


def test_the_rayjob_is_what_submit_prints(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = ["submit", "jobs/imagenet.yaml", "--to", "kuberay", "--site", "infra/kuberay/site.yaml", "--dry-run"]
    assert main([*words, *SETS]) == 0
    printed = list(yaml.safe_load_all(capsys.readouterr().out))
    written = documents(INFRA / "kuberay" / "rayjob.yaml")
    # The resolved job gets new keys with time, and the name of its map is their hash; what it says must stay.
    path = ROOT / "infra" / "kuberay" / "rayjob.yaml"
    for config_map in (printed[0], written[0]):
        job = yaml.safe_load(config_map["data"].pop("imagenet.yaml"))
        assert job["data"]["train"] == "/shared/imagenet/train" and job["runs"] == "/shared/runs"
        assert job["train"]["epochs"] == imagenet().train.epochs
    name = written[0]["metadata"]["name"]
    assert printed[0]["metadata"].pop("name").startswith("imagenet-") and written[0]["metadata"].pop("name")
    assert printed[0] == written[0]
    text = yaml.safe_dump(printed[1])
    text = re.sub(r"imagenet-[0-9a-f]{8}", name, text)
    assert yaml.safe_load(text) == written[1], f"{path}: print it again, see infra/kuberay/README.md"


def test_the_batch_script_is_what_submit_prints(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    words = ["submit", "jobs/imagenet.yaml", "--to", "slurm", "--site", "infra/slurm/site.yaml", "--dry-run"]
    assert main([*words, *SETS]) == 0
    assert capsys.readouterr().out == (INFRA / "slurm" / "imagenet.sh").read_text()


# --- what must not be there

FORBIDDEN = {
    "a public load balancer": r"LoadBalancer|NodePort|kind:\s*Ingress\b|enableIngress",
    "the latest image": r":latest\b",
    "a floating image": r"^\s*(image|FROM):?\s+[\w./-]+\s*$",
    "root": r"runAsUser:\s*0\b|USER\s+(root|0)\b|user:\s*[\"']?(root|0)\b|privileged:\s*true|"
    r"hostNetwork:\s*true|hostPath",
    "a credential": r"AKIA[0-9A-Z]{16}|AIza[\w-]{35}|BEGIN [A-Z ]*PRIVATE KEY|://[^/\s:@$]+:[^@\s$<{]+@|"
    r"(?i:password|secret_key|token)\s*[:=]\s*[\"']?[A-Za-z0-9+/]{12,}",
    "everybody's traffic": r"CidrIp:\s*0\.0\.0\.0/0|--cidr\s+0\.0\.0\.0/0|source-ranges[= ]0\.0\.0\.0/0",
}


def forbidden(text: str) -> list[str]:
    return [what for what, pattern in FORBIDDEN.items() if re.search(pattern, text, re.MULTILINE)]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_public_floating_root_or_secret_is_in_infra(path: Path) -> None:
    text = path.read_text()
    assert forbidden(text) == []
    if re.search(r"dashboard-host=0\.0\.0\.0", text):
        assert re.search(r"RAY_AUTH_MODE: token", text), "a dashboard beyond loopback needs the token"


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("type: LoadBalancer", "a public load balancer"),
        ("image: debian:latest", "the latest image"),
        ("image: minio/minio", "a floating image"),
        ("runAsUser: 0", "root"),
        ("USER root", "root"),
        ("password: hunter2hunter2", "a credential"),
        ("postgresql://mlflow:hunter2@db/mlflow", "a credential"),
        ("--cidr 0.0.0.0/0", "everybody's traffic"),
    ],
)
def test_the_search_for_what_must_not_be_there_finds_it(line: str, what: str) -> None:
    assert forbidden(f"x: y\n{line}\n") == [what]
