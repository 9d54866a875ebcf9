"""A user's own objective: trained, kept with its run, part of the job's identity, and every mistake one clear line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.errors import EXIT_DONE, EXIT_JOB, CheckpointError
from orchestrator.job.load import job_sha256, job_to_dict, load_job
from tests.conftest import TINY_JOB, Command
from tests.runs import summary_of

GOOD = """\
import torch
from torch import nn
from torch.nn import functional as F

from hff.objectives import Head


class Squares(Head):
    def __init__(self, features, num_classes, *, grid, wanted=1.0):
        super().__init__(features, num_classes, grid)
        self.linear = nn.Linear(features, num_classes)
        self.wanted = wanted

    def logits(self, feature_BD):
        return self.linear(feature_BD)

    def loss(self, logit_BC, target_B):
        target_BC = F.one_hot(target_B, self.num_classes) * self.wanted
        return (logit_BC - target_BC).square().mean(dim=1)
"""
OWN_JOB = TINY_JOB.replace("{{name: hff, prototypes_per_class: 2}}", "{{file: mine.py, class: Squares, wanted: 2.0}}")


@pytest.fixture
def own_job(tmp_path: Path, tiny_job: Callable[..., Path]) -> Callable[..., Path]:
    """A job with an objective in a file beside it."""

    def write(source: str = GOOD, text: str = OWN_JOB) -> Path:
        (tmp_path / "mine.py").write_text(source)
        return tiny_job("own", text)

    return write


def test_it_trains_and_its_run_can_be_moved_evaluated_asked_and_exported(
    own_job: Callable[..., Path], in_process: Command, tmp_path: Path
) -> None:
    path = own_job()
    done = in_process("run", path)
    assert done.returncode == EXIT_DONE, done.stdout + done.stderr
    run = tmp_path / "runs" / "own"
    top1 = summary_of(run)["val_top1"]
    assert top1 > 0.8
    assert (run / "objective.py").read_text() == GOOD
    assert yaml.safe_load((run / "job.yaml").read_text())["objective"]["file"] == "objective.py"

    (tmp_path / "mine.py").unlink()
    moved = run.rename(run.with_name("moved"))
    answer = tmp_path / "eval.json"
    assert in_process("eval", moved, "--json", answer).returncode == EXIT_DONE
    assert json.loads(answer.read_text())["top1"] == top1

    exported = in_process("export", moved, "--format", "safetensors")
    assert exported.returncode == EXIT_DONE, exported.stderr
    (moved / "objective.py").unlink()
    from orchestrator.run.inference.export import load_safetensors

    with pytest.raises(CheckpointError, match="holds code of its own"):
        load_safetensors(moved / "network.safetensors")
    classifier, description = load_safetensors(moved / "network.safetensors", run_its_code=True)
    assert description["objective"]["source"] == GOOD
    assert type(classifier.layers()[0].head).__name__ == "Squares"
    assert in_process("eval", moved).returncode == EXIT_JOB


def test_code_that_torch_cannot_trace_is_refused_in_a_line_with_the_format_that_takes_it(
    own_job: Callable[..., Path], in_process: Command, tmp_path: Path
) -> None:
    counts = "return self.linear(feature_BD if len(feature_BD) > 25 else feature_BD + 0.0)"
    path = own_job(GOOD.replace("return self.linear(feature_BD)", counts))
    assert in_process("run", path, "--set", "train.epochs=1").returncode == EXIT_DONE
    done = in_process("export", tmp_path / "runs" / "own", "--format", "torch-export")
    assert done.returncode == EXIT_JOB
    assert done.stderr.startswith("--format torch-export: torch cannot trace the code of this network for any number")
    assert done.stderr.endswith("take --format safetensors, which keeps it as it is\n")
    assert not list((tmp_path / "runs" / "own").glob("*network*"))


def test_another_code_is_another_job_and_another_place_is_not(own_job: Callable[..., Path], tmp_path: Path) -> None:
    path = own_job()
    before = job_sha256(load_job(path))
    assert job_sha256(load_job(path, ["objective.wanted=3.0"])) != before
    (tmp_path / "elsewhere.py").write_text(GOOD)
    assert job_sha256(load_job(path, ["objective.file=elsewhere.py"])) == before
    (tmp_path / "mine.py").write_text(GOOD + "# changed\n")
    assert job_sha256(load_job(path)) != before


def test_a_run_does_not_go_on_with_changed_code(own_job: Callable[..., Path], in_process: Command) -> None:
    path = own_job()
    assert in_process("run", path, "--set", "train.epochs=1").returncode == EXIT_DONE
    own_job(GOOD.replace("mean(dim=1)", "sum(dim=1)"))
    done = in_process("run", path, "--set", "train.epochs=1")
    assert done.returncode == EXIT_JOB
    assert "objective.sha256: was " in done.stderr


def test_options_are_kept_as_they_are(own_job: Callable[..., Path]) -> None:
    source = GOOD.replace("wanted=1.0", "wanted=1.0, more=()")
    path = own_job(source, text=OWN_JOB.replace("wanted: 2.0", "wanted: 2.0, more: [1, {{a: no}}]"))
    values = job_to_dict(load_job(path))["objective"]
    assert (values["class"], values["wanted"], values["more"]) == ("Squares", 2.0, [1, {"a": "no"}])


def test_check_runs_nothing_of_the_file(own_job: Callable[..., Path], in_process: Command, tmp_path: Path) -> None:
    path = own_job(f"open({str(tmp_path / 'touched')!r}, 'w')\n" + GOOD)
    assert in_process("check", path).returncode == EXIT_DONE
    assert not (tmp_path / "touched").exists()


OFFLINE: dict[str, tuple[str, str]] = {
    "no such class": (
        GOOD.replace("class Squares", "class Square"),
        "PATH:7: objective.class: must be a class that FILE defines at its top level (it has: Square), "
        "got 'Squares'; did you mean 'Square'?",
    ),
    "no class at all": (
        "x = 1\n",
        "PATH:7: objective.class: must be a class that FILE defines at its top level (it has: none), got 'Squares'",
    ),
    "unknown options": (
        GOOD.replace("wanted=1.0", "wnated=1.0"),
        "PATH:7: objective.wanted: must be an option of Squares of FILE (it has: wnated); did you mean 'wnated'?",
    ),
    "no Python": ("class Squares(:\n", "PATH:7: objective.file: must be valid Python, got FILE:1: invalid syntax"),
}


@pytest.mark.parametrize("case", OFFLINE)
def test_a_file_without_the_class_is_refused_offline(
    case: str, own_job: Callable[..., Path], in_process: Command, tmp_path: Path
) -> None:
    source, message = OFFLINE[case]
    path = own_job(source)
    for command in ("check", "run"):
        done = in_process(command, path)
        assert done.returncode == EXIT_JOB
        assert done.stderr.strip() == message.replace("PATH", str(path)).replace("FILE", str(tmp_path / "mine.py"))


def test_a_missing_file_is_refused_offline(own_job: Callable[..., Path], in_process: Command, tmp_path: Path) -> None:
    done = in_process("check", own_job(), "--set", "objective.file=no/such.py")
    assert done.returncode == EXIT_JOB
    wanted = f"--set: objective.file: must be a Python file, got no such file: {tmp_path / 'no' / 'such.py'}"
    assert done.stderr.strip() == wanted


def test_a_file_of_another_encoding_is_refused_offline(
    own_job: Callable[..., Path], in_process: Command, tmp_path: Path
) -> None:
    path, file = own_job(), tmp_path / "mine.py"
    file.write_bytes(b"# -*- coding: latin-1 -*-\n# gr\xfc\xdfe\n" + GOOD.encode())
    done = in_process("check", path)
    assert done.returncode == EXIT_JOB
    assert done.stderr.strip() == f"{path}:7: objective.file: must be UTF-8 text, got {file}:2: the byte 0xfc"


def test_a_hash_of_other_code_is_refused(own_job: Callable[..., Path], in_process: Command) -> None:
    done = in_process("check", own_job(), "--set", f"objective.sha256={'a' * 64}")
    assert done.returncode == EXIT_JOB
    assert "--set: objective.sha256: must be that of " in done.stderr


# Name: source, override, message.
LIVE: dict[str, tuple[str, str, str]] = {
    "raises": (
        "raise KeyError('x')\n" + GOOD,
        "",
        "objective.file: must be a module that can be run, got FILE:1: KeyError: 'x'",
    ),
    "no head": (
        GOOD.replace("(Head)", "(nn.Module)"),
        "",
        "objective.class: must be a subclass of hff.objectives.Head, got Squares of FILE",
    ),
    "unknown option of a constructor that takes any": (
        GOOD.replace("wanted=1.0):", "wanted=1.0, **more):").replace("grid)", "grid, **more)"),
        "objective.wnated=1",
        "objective: Squares of FILE: cannot be made with its options (wanted, wnated): FILE:10: TypeError: ",
    ),
    "option that the class refuses": (
        GOOD.replace("self.wanted = wanted", "raise ValueError('too large')"),
        "",
        "objective: Squares of FILE: cannot be made with its options (wanted): FILE:12: ValueError: too large",
    ),
    "loss of a batch": (
        GOOD.replace(".mean(dim=1)", ".mean()"),
        "",
        "objective: Squares of FILE: loss must have the shape (2,) for 2 samples, got ()",
    ),
    "logits that are features": (
        GOOD.replace("return self.linear(feature_BD)", "return feature_BD"),
        "",
        "objective: Squares of FILE: cannot judge features (2, 256): FILE:19: RuntimeError: ",
    ),
}


@pytest.mark.parametrize("case", LIVE)
def test_a_class_that_cannot_train_is_refused_before_anything_starts(
    case: str, own_job: Callable[..., Path], in_process: Command, tmp_path: Path
) -> None:
    source, override, message = LIVE[case]
    done = in_process("run", own_job(source), *(("--set", override) if override else ()))
    assert done.returncode == EXIT_JOB
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(message.replace("FILE", str(tmp_path / "mine.py")))
    assert not (tmp_path / "runs" / "own").exists() or not (tmp_path / "runs" / "own" / "job.yaml").exists()


def test_a_submitted_job_takes_its_objective_along_or_is_refused(own_job: Callable[..., Path], tmp_path: Path) -> None:
    from orchestrator.errors import JobError
    from orchestrator.launch.clusters.submit import plan_submission

    path = own_job()
    assert "mine.py" in plan_submission(str(path), []).package.files
    outside = tmp_path.parent / f"{tmp_path.name}-outside.py"
    outside.write_text(GOOD)
    with pytest.raises(JobError, match=r"must be a file of .* that is uploaded"):
        plan_submission(str(path), [f"objective.file={outside}"])


def test_the_job_in_a_run_folder_is_the_job(own_job: Callable[..., Path], in_process: Command, tmp_path: Path) -> None:
    path = own_job()
    assert in_process("run", path, "--set", "train.epochs=1").returncode == EXIT_DONE
    kept: Any = load_job(tmp_path / "runs" / "own" / "job.yaml")
    assert job_sha256(kept) == job_sha256(load_job(path, ["train.epochs=1"]))
