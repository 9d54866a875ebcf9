"""From file and overrides to a resolved job: paths, `--set`, and what is imported on the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import JobError
from orchestrator.job.load import job_yaml, load_job, resolve_runs

ROOT = Path(__file__).parents[2]


def write(folder: Path, text: str, *, name: str = "x.yaml") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize("marker", ["pyproject.toml", ".git"])
def test_relative_paths_begin_at_the_nearest_repository_above_the_job(tmp_path: Path, text: str, marker: str) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / "inner" / marker).mkdir(parents=True)
    job = load_job(write(tmp_path / "inner" / "jobs" / "deep", text), ["data.val=data/val"])
    assert job.runs == str(tmp_path / "inner" / "runs")
    assert job.data.train == str(tmp_path / "inner" / "data" / "shards")
    assert job.data.val == str(tmp_path / "inner" / "data" / "val")


def test_without_a_repository_relative_paths_begin_beside_the_job(tmp_path: Path, text: str) -> None:
    job = load_job(write(tmp_path / "a", text), ["runs=../other", "data.test=./t"])
    assert job.runs == str(tmp_path / "other")
    assert job.data.train == str(tmp_path / "a" / "data" / "shards")
    assert job.data.test == str(tmp_path / "a" / "t")


def test_the_working_directory_decides_nothing(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a", text)
    elsewhere = load_job(path)
    monkeypatch.chdir(tmp_path / "a")
    assert load_job("x.yaml") == elsewhere


def test_a_path_of_set_that_is_right_in_the_folder_of_the_shell_alone_is_refused_with_the_one_that_is_meant(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "project", text)
    here = tmp_path / "here"
    (here / "mine").mkdir(parents=True)
    (here / "kept").mkdir()
    (tmp_path / "project/kept").mkdir()
    monkeypatch.chdir(here)
    with pytest.raises(JobError) as refused:
        load_job(path, ["data.train=mine", "data.val=./mine", "data.test=kept"])
    assert str(refused.value).splitlines() == [
        f"--set: data.{key}: must begin at {tmp_path}/project, as relative paths of this job do, got {given!r}; "
        f"did you mean {here}/mine?"
        for key, given in (("train", "mine"), ("val", "./mine"))
    ]
    assert load_job(path, ["data.train=nowhere", f"data.val={here}/mine"]).data.train == f"{tmp_path}/project/nowhere"


def test_absolute_paths_home_and_file_urls_stay_where_they_are(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    job = load_job(path, ["runs=~/r", "data.train=/d/a", "data.val='file:///d/b%20c'", "data.test=digits"])
    assert job.runs == os.path.expanduser("~/r")
    assert (job.data.train, job.data.val, job.data.test) == ("/d/a", "/d/b c", "digits")


def test_a_relative_sqlite_file_becomes_absolute_and_a_server_stays(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    assert load_job(path, ["tracking.uri=sqlite:///t.db"]).tracking.uri == f"sqlite:///{tmp_path}/t.db"
    for uri in ("sqlite:////a/t.db", "http://host:5000", "postgresql+psycopg://host/db"):
        assert load_job(path, [f"tracking.uri={uri}"]).tracking.uri == uri


def test_in_a_ray_package_relative_runs_go_to_the_home_folder_and_a_line_says_so(tmp_path: Path, text: str) -> None:
    package = tmp_path / "working_dir_files" / "_ray_pkg_0123456789abcdef"
    path = write(package / "jobs", text)
    (package / "pyproject.toml").touch()
    lines: list[str] = []
    job = load_job(path, tell=lines.append)
    home = os.path.expanduser("~/orchestrator-runs")
    assert job.runs == home
    assert lines == [f"runs: {home} (the job file is in a Ray working-dir package, which is temporary)"]
    assert job.data.train == str(package / "data" / "shards")
    lines.clear()
    assert load_job(path, ["runs=/shared/runs"], tell=lines.append).runs == "/shared/runs"
    assert lines == []


def test_resolve_runs_agrees_with_the_loaded_job(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    job = load_job(path, ["runs=r"])
    assert resolve_runs(path, job) == job.runs == str(tmp_path / "r")
    assert resolve_runs(path, job.model_copy(update={"runs": "other"})) == str(tmp_path / "other")


def test_a_saved_job_runs_the_same_from_anywhere(tmp_path: Path, text: str) -> None:
    job = load_job(write(tmp_path / "jobs", text), ["tracking.uri=sqlite:///t.db"])
    saved = write(tmp_path / "far" / "sample", job_yaml(job), name="job.yaml")
    (tmp_path / "far" / ".git").mkdir()
    assert load_job(saved) == job


def test_a_later_override_wins_and_values_are_yaml(load: Any) -> None:
    job = load("train.lr=1", "train.lr=2e-3", "model.widths=[4, 5]", "name=no", "train.max_hours=null")
    assert job.train.lr == 0.002
    assert job.model.widths == (4, 5)
    assert job.name == "no"
    assert job.train.max_hours is None


def test_an_override_may_hold_an_equals_sign_and_make_a_section(load: Any) -> None:
    job = load("tracking.experiment=a=b", "data.val.from_train=0.5", "data.augment.flip=true")
    assert job.tracking.experiment == "a=b"
    assert job.data.val.from_train == 0.5
    assert job.data.augment.flip is True


def test_an_override_repairs_what_the_file_has_wrong(load: Any, text: str) -> None:
    broken = text.replace("1e-3", "*lr").replace("epochs: 4", "epochs: zero")
    job = load("train.lr=0.5", "train.epochs=2", content=broken.replace("*lr", "oops"))
    assert (job.train.lr, job.train.epochs) == (0.5, 2)


def test_check_needs_none_of_the_heavy_libraries_and_no_two_seconds(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    program = (
        "import json, sys, time\n"
        "start = time.process_time()\n"
        "from orchestrator.job.load import load_job\n"
        f"load_job({str(path)!r}, ['data.expect={{train_samples: 5000, classes: 10}}'])\n"
        "print(json.dumps([time.process_time() - start, sorted(sys.modules)]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT, timeout=60
    )
    seconds, modules = json.loads(done.stdout)
    heavy = {"torch", "ray", "mlflow", "numpy", "PIL", "webdataset", "sklearn", "pandas", "rich", "timm"}
    assert not heavy & set(modules)
    assert "hff.shapes" in modules
    assert seconds < 2
