"""A job against the data that it names: what is missing or disagrees is told with its line and what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from orchestrator.data.packing.pack import pack
from tests.conftest import Command
from tests.data.conftest import encoded, noise, write_tar

JOB = """\
kind: train
name: sample
data:
  train: {train}
  val: {val}
  image_size: 8
{expect}model: {{arch: mlp, widths: [8, 8]}}
objective: {{name: hff}}
train: {{epochs: 1, global_batch_size: 2, lr: 1e-3}}
cluster: {{launcher: process}}
"""


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images of two classes."""
    folder = tmp_path_factory.mktemp("packed")
    images = [(f"{label}/{i}.png", encoded(noise(i))) for label in "ab" for i in range(3)]
    return pack(write_tar(folder / "images.tar", images), folder / "set").folder


def job(folder: Path, train: Path, val: Path | str = "{from_train: 0.5}", expect: str = "") -> Path:
    path = folder / "x.yaml"
    path.write_text(JOB.format(train=train, val=val, expect=f"  expect: {expect}\n" if expect else ""))
    return path


def test_check_names_the_lines_of_data_that_are_not_there_yet_and_finds_the_job_valid(
    in_process: Command, tmp_path: Path
) -> None:
    path = job(tmp_path, tmp_path / "one", tmp_path / "two")
    result = in_process("check", path)
    assert result.returncode == 0
    assert result.stdout.splitlines()[1:] == [
        f"note: {path}:{line}: data.{key}: {tmp_path / name}: there is no such folder; make it with: "
        f"orchestrator data pack SOURCE {tmp_path / name}"
        for line, key, name in ((4, "train", "one"), (5, "val", "two"))
    ]


def test_run_refuses_all_missing_data_at_once_with_their_lines(in_process: Command, tmp_path: Path) -> None:
    path = job(tmp_path, tmp_path / "one", tmp_path / "two")
    result = in_process("run", path, "--set", f"data.test={tmp_path / 'three'}")
    assert result.returncode == 3
    starts = [line.split(": there is no such")[0] for line in result.stderr.splitlines()]
    assert starts == [
        f"{path}:4: data.train: {tmp_path / 'one'}",
        f"{path}:5: data.val: {tmp_path / 'two'}",
        f"--set: data.test: {tmp_path / 'three'}",
    ]


def test_a_training_run_names_the_shard_that_is_gone_and_ends_with_exit_3(
    in_process: Command, tmp_path: Path, packed: Path
) -> None:
    copy = tmp_path / "set"
    shutil.copytree(packed, copy)
    (shard,) = copy.glob("*.tar")
    shard.unlink()
    result = in_process("run", job(tmp_path, copy))
    assert result.returncode == 3
    assert result.stderr.splitlines()[0].startswith(f"{shard}: "), result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "runs" / "sample" / "summary.json").exists()


def test_a_folder_that_is_not_there_is_told_with_the_packed_one_that_is_like_it(
    in_process: Command, tmp_path: Path, packed: Path
) -> None:
    shutil.copytree(packed, tmp_path / "mine-val")
    (tmp_path / "mine-vol").mkdir()
    typed = tmp_path / "mine-vla"
    result = in_process("run", job(tmp_path, packed, typed))
    assert result.returncode == 3
    assert result.stderr == (
        f"{tmp_path / 'x.yaml'}:5: data.val: {typed}: there is no such folder (did you mean {tmp_path / 'mine-val'}?); "
        f"make it with: orchestrator data pack SOURCE {typed}\n"
    )


@pytest.mark.parametrize(
    ("inside", "remedy"),
    [
        ("cat/1.jpg", "images are packed into a folder of their own: orchestrator data pack {0} {0}-shards"),
        ("0.tar", "if its tars are WebDataset shards, make it with: orchestrator data index {0}"),
        (".hidden", "make it with: orchestrator data pack SOURCE {0}"),
    ],
)
def test_the_remedy_fits_what_lies_there_instead(in_process: Command, tmp_path: Path, inside: str, remedy: str) -> None:
    folder = tmp_path / "mine"
    (folder / inside).parent.mkdir(parents=True)
    (folder / inside).touch()
    result = in_process("check", job(tmp_path, folder))
    assert result.stdout.endswith(f"no index.json there; {remedy.format(folder)}\n")


def test_a_tar_in_place_of_a_packed_folder_is_to_be_packed(in_process: Command, tmp_path: Path) -> None:
    (tmp_path / "mine.tar.gz").touch()
    result = in_process("run", job(tmp_path, tmp_path / "mine.tar.gz"))
    assert result.returncode == 3
    assert f"orchestrator data pack {tmp_path / 'mine.tar.gz'} {tmp_path / 'mine-shards'}" in result.stderr


@pytest.mark.parametrize("command", ["check", "run"])
def test_all_numbers_that_are_not_those_of_the_index_are_named_with_the_remedy(
    in_process: Command, tmp_path: Path, packed: Path, command: str
) -> None:
    path = job(tmp_path, packed, packed, "{train_samples: 7, val_samples: 6, classes: 3}")
    result = in_process(command, path)
    assert result.returncode == 3
    assert result.stderr.splitlines() == [
        f"{path}:7: data.expect.train_samples: the job states 7, the index has 6; correct it, or delete data.expect",
        f"{path}:7: data.expect.classes: the job states 3, the index has 2; correct it, or delete data.expect",
    ]


def test_the_data_of_a_search_are_looked_at_where_its_base_names_them(
    in_process: Command, tmp_path: Path, packed: Path
) -> None:
    base = job(tmp_path, packed).read_text().replace("\n", "\n  ").rstrip()
    path = tmp_path / "search.yaml"
    path.write_text(f"kind: search\nname: s\nspace: {{train.lr: {{choice: [1, 2]}}}}\nbase:\n  {base}\n")
    result = in_process("check", path, "--set", f"base.data.val={tmp_path / 'nowhere'}")
    assert result.returncode == 0, result.stderr
    assert f"note: --set: base.data.val: {tmp_path / 'nowhere'}: there is no such folder; " in result.stdout
    path.write_text(path.read_text().replace(str(packed), str(tmp_path / "gone")))
    result = in_process("run", path)
    assert result.returncode == 3
    assert result.stderr.startswith(f"{path}:8: base.data.train: {tmp_path / 'gone'}: there is no such folder; ")
    path.write_text(path.read_text().replace(str(tmp_path / "gone"), str(packed)))
    result = in_process("check", path, "--set", "base.data.expect={train_samples: 6, classes: 9}")
    assert result.returncode == 3
    assert result.stderr.startswith("--set: base.data.expect.classes: the job states 9, the index has 2")


def test_a_plan_takes_images_and_classes_from_a_local_index(in_process: Command, tmp_path: Path, packed: Path) -> None:
    out = tmp_path / "plan.json"
    for val, steps in ((packed, 3), ("{from_train: 0.3}", 2)):
        assert in_process("plan", job(tmp_path, packed, val), "--json", out).returncode == 0
        assert json.loads(out.read_text())["steps_per_epoch"] == steps, "six or four images, two a step"
    result = in_process("plan", job(tmp_path, tmp_path / "nowhere"))
    assert result.returncode == 2
    assert result.stderr.startswith(f"{tmp_path / 'x.yaml'}:3: data.expect: must state train_samples and classes")
    assert f"{tmp_path / 'nowhere'} has no index here" in result.stderr


def test_what_is_wrong_with_a_job_only_here_is_told_with_its_line_too(
    in_process: Command, tmp_path: Path, packed: Path
) -> None:
    path = job(tmp_path, packed)
    text = path.read_text()
    path.write_text(text.replace("global_batch_size: 2", "global_batch_size: 5"))
    result = in_process("run", path)
    assert (result.returncode, result.stderr) == (
        2, f"{path}:9: train.global_batch_size: must be at most the 2 training samples, got 5\n"
    )  # fmt: skip
    assert not (tmp_path / "runs" / "sample").exists()
    small = text.replace("launcher: process", "launcher: ray, memory_gb: 1.0e-6")
    path.write_text(small)
    result = in_process("plan", path)
    assert result.returncode == 2
    assert result.stderr.startswith(f"{path}:10: cluster.memory_gb: no split of the 2 layers among 1 workers fits")
    site = tmp_path / "site.yaml"
    site.write_text("kuberay: {image: r/o:1, claim: shared}\n")
    result = in_process("submit", path, "--to", "kuberay", "--site", site, "--dry-run", "--set", f"runs={tmp_path}")
    assert result.returncode == 2
    assert [line.split(" must lie below")[0] for line in result.stderr.splitlines()] == [
        "--set: runs:", f"{path}:4: data.train:"
    ]  # fmt: skip


def test_a_plan_of_a_search_names_the_line_of_its_base(in_process: Command, tmp_path: Path, packed: Path) -> None:
    base = (
        job(tmp_path, packed)
        .read_text()
        .replace("\n", "\n  ")
        .rstrip()
        .replace("launcher: process", "memory_gb: 1.0e-6")
    )
    path = tmp_path / "search.yaml"
    path.write_text(f"kind: search\nname: s\nspace: {{train.lr: {{choice: [1, 2]}}}}\nbase:\n  {base}\n")
    result = in_process("plan", path)
    assert result.stderr.startswith(f"{path}:14: base.cluster.memory_gb: no split"), result.stderr
