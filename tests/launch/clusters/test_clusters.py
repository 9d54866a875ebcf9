"""A job as a RayJob and as a batch script: its resources, its places, and what is said when something is missing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.cli import main
from orchestrator.errors import JobError, OrchestratorError
from orchestrator.job.load import load_any, load_job
from orchestrator.job.site import Site, load_site
from orchestrator.launch.clusters import outside
from orchestrator.launch.clusters.kuberay import manifests
from orchestrator.launch.clusters.shape import Shape, shape_of
from orchestrator.launch.clusters.slurm import batch_script

JOB = """\
kind: train
name: Far_Away.1
runs: /shared/runs
data: {train: /shared/train, val: /shared/val, image_size: 8, channels: 1}
model: {arch: mlp, widths: [8, 8]}
objective: {name: hff}
train: {epochs: 1, global_batch_size: 48, lr: 1e-3}
cluster: {workers: 6, cpus_per_worker: 1.5, timeout_s: 100.5}
"""
SEARCH = """\
kind: search
name: look
runs: /shared/runs
base:
  data: digits
  model: {arch: mlp, widths: [8, 8]}
  objective: {name: hff}
  train: {epochs: 1, global_batch_size: 48, lr: 1e-3}
  cluster: {workers: 2, cpus_per_worker: 0.9}
space: {train.lr: {loguniform: [1e-4, 1e-1]}}
concurrency: 2
"""


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "jobs").mkdir()
    path = tmp_path / "jobs" / "far.yaml"
    path.write_text(JOB)
    return path


@pytest.fixture
def site_file(tmp_path: Path) -> Path:
    path = tmp_path / "site.yaml"
    path.write_text("workers_per_node: 4\nmemory_gib_per_worker: 2\nslurm: {partition: gpu, account: us, hours: 1.5}\n")
    return path


def words_of(text: str, name: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(f"#SBATCH --{name}=")]


@pytest.mark.parametrize(
    ("workers", "fits", "nodes", "each"), [(6, 4, 2, 3), (8, 8, 1, 8), (3, 2, 3, 1), (16, 8, 2, 8), (1, 8, 1, 1)]
)
def test_nodes_hold_all_workers_and_no_more(job_file: Path, workers: int, fits: int, nodes: int, each: int) -> None:
    job = load_job(job_file, [f"cluster.workers={workers}", "cluster.use_gpu=true", "cluster.cpus_per_worker=2"])
    shape = shape_of(job, Site(workers_per_node=fits, memory_gib_per_worker=3, shared_memory_gib=5))
    assert shape == Shape(nodes, each, cpus=2 * each, gpus=each, memory_gib=3 * each + 5)


def test_a_search_gets_room_for_its_drivers_and_the_trials_it_runs_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "search.yaml"
    path.write_text(SEARCH)
    assert shape_of(load_any(path), Site(workers_per_node=4)) == Shape(1, 4, cpus=4, gpus=0, memory_gib=36)
    one = load_any(path, ["concurrency=auto"])
    assert shape_of(one, Site(workers_per_node=4)) == Shape(1, 2, cpus=2, gpus=0, memory_gib=20)


def test_a_rayjob_has_the_resources_of_the_job_and_runs_the_resolved_job(job_file: Path, tmp_path: Path) -> None:
    job = load_job(job_file, ["train.lr=2e-3"])
    config_map, ray_job = manifests(job, Site(workers_per_node=4), "must")
    ((file, text),) = config_map["data"].items()
    (tmp_path / file).write_text(text)
    assert load_job(tmp_path / file) == job
    spec = ray_job["spec"]
    assert spec["entrypoint"] == f"python -m orchestrator run /job/{file} --resume must"
    assert yaml.safe_load(spec["runtimeEnvYAML"]) == {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "161"}}
    assert spec["backoffLimit"] == job.cluster.max_failures
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    container = group["template"]["spec"]["containers"][0]
    assert (group["replicas"], container["resources"]["limits"]) == (2, {"cpu": "5", "memory": "28Gi"})
    assert ray_job["metadata"]["generateName"] == "far-away-1-"
    mounted = [v["configMap"]["name"] for v in group["template"]["spec"]["volumes"] if "configMap" in v]
    assert mounted == [config_map["metadata"]["name"]]


def test_a_search_on_kuberay_travels_whole(tmp_path: Path) -> None:
    path = tmp_path / "search.yaml"
    path.write_text(SEARCH)
    search = load_any(path)
    config_map, _ = manifests(search, Site())
    (tmp_path / "again.yaml").write_text(config_map["data"]["look.yaml"])
    assert load_any(tmp_path / "again.yaml") == search


def test_places_that_pods_do_not_share_are_refused_all_at_once(
    job_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["submit", str(job_file), "--to", "kuberay", "--dry-run", "--set", "runs=runs"]
    words += ["--set", "data.train=/sharedness/train", "--set", "tracking.uri=sqlite:////home/me/mlflow.db"]
    assert main(words) == 2
    said = capsys.readouterr().err.splitlines()
    assert said == [
        f"--set: runs: must lie below /shared, the storage that all pods share, got {job_file.parent.parent / 'runs'} "
        "(add --set runs=/shared/...)",
        "--set: data.train: must lie below /shared, the storage that all pods share, got /sharedness/train "
        "(add --set data.train=/shared/...)",
        "--set: tracking.uri: must lie below /shared, the storage that all pods share, got /home/me/mlflow.db "
        "(add --set tracking.uri=/shared/...)",
    ]


def test_a_batch_script_asks_for_the_jobs_resources_and_runs_the_jobs_command(job_file: Path, site_file: Path) -> None:
    job = load_job(job_file)
    text = batch_script(job, load_site(site_file), ["python", "-m", "orchestrator", "run", "a b.yaml"])
    for name, value in {
        "nodes": "2", "cpus-per-task": "5", "mem": "10G", "time": "90", "partition": "gpu", "account": "us",
        "signal": "B:TERM@161",
    }.items():  # fmt: skip
        assert words_of(text, name) == [f"#SBATCH --{name}={value}"]
    assert words_of(text, "gpus-per-node") == []
    assert "\npython -m orchestrator run 'a b.yaml' &\n" in text
    assert "--include-dashboard=false" in text and "RAY_AUTH_MODE=token" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "cloud"], "argument --to: invalid choice: 'cloud' (choose from"),
        (["--site", "site.yaml"], "--site: only with --to kuberay or slurm"),
        (["--to", "slurm", "--address", "http://h:8265"], "--address: only with --to ray, got --to slurm"),
        (["--to", "slurm", "--site", "nowhere.yaml"], "--site: nowhere.yaml: must be a readable YAML file"),
        (["--to", "slurm", "--set", "train.lr=-1"], "--set: train.lr: must be > 0, got -1"),
        (
            ["--to", "slurm", "--set", "cluster.launcher=process"],
            "cluster.launcher: must be ray on a cluster, got 'process' (add --set cluster.launcher=ray)",
        ),
        (
            ["--to", "slurm"],
            "sbatch: must be installed to submit from here, got no such program; run this on a login node, or there: "
            "orchestrator submit JOB --to slurm --dry-run > job.sh; sbatch job.sh",
        ),
        (
            ["--to", "kuberay"],
            "kubectl: must be installed to submit from here, got no such program; or send it from elsewhere: "
            "orchestrator submit JOB --to kuberay --dry-run | kubectl create -f -",
        ),
    ],
)
def test_what_cannot_be_submitted_is_told_and_exits_2(
    job_file: Path,
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["submit", str(job_file), *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("workers_per_nod: 4\n", "site.yaml:1: workers_per_nod: "),
        ("workers_per_node: 0\n", "site.yaml:1: workers_per_node: must be"),
        ("a: [\n", "site.yaml:"),
        ("- a\n", "site.yaml:1: must be a mapping of keys"),
        ("kuberay:\n  image: ours:latest\n", "site.yaml:2: kuberay.image: must be an image with a tag other"),
        ("kuberay:\n  image: ours\n", "site.yaml:2: kuberay.image: must be an image with a tag"),
        ("kuberay:\n  mount: shared\n", "site.yaml:2: kuberay.mount: must be an absolute path below /"),
        ("kuberay:\n  namespace: Ours\n", "site.yaml:2: kuberay.namespace: must be lower-case letters"),
        ("slurm:\n  hours: -1\n", "site.yaml:2: slurm.hours: must be"),
    ],
)  # fmt: skip
def test_a_bad_site_file_is_told_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(text)
    with pytest.raises(JobError) as refused:
        load_site(path)
    assert message in str(refused.value)


def program(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_kubectl_is_given_the_map_first_and_then_the_job(
    job_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log"
    program(tmp_path / "bin", "kubectl", f'echo "--- # $*" >> {log}; cat >> {log}; echo rayjob.ray.io/far-away-1-abcde')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    assert main(["submit", str(job_file), "--to", "kuberay"]) == 0
    sent: list[Any] = [document for document in yaml.safe_load_all(log.read_text()) if document]
    assert [document["kind"] for document in sent] == ["ConfigMap", "RayJob"]
    assert "# apply -f -" in log.read_text() and "# create -f - -o name" in log.read_text()
    assert "kubectl -n orchestrator logs -f job/far-away-1-abcde" in capsys.readouterr().out


def test_sbatch_is_given_the_script_in_the_projects_directory(
    job_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log"
    program(tmp_path / "bin", "sbatch", f"echo \"$@\" > {log}; cat >> {log}; echo '77;cluster'")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    assert main(["submit", str(job_file), "--to", "slurm", "--set", "train.lr=2e-3", "--resume", "never"]) == 0
    sent = log.read_text().splitlines()
    assert sent[0] == f"--parsable --chdir={tmp_path}"
    assert "python -m orchestrator run jobs/far.yaml --set train.lr=2e-3 --resume never &" in sent
    assert "Submitted batch job 77\n" in capsys.readouterr().out


def test_what_a_program_said_when_it_failed_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path / "bin", "sbatch", "cat > /dev/null; echo 'error: invalid partition' >&2; exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(OrchestratorError, match="sbatch --parsable failed with exit code 1: error: invalid partition"):
        outside.call(["sbatch", "--parsable"], "x", instead="")
