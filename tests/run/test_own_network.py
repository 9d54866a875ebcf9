"""A user's own network: the bits of a built-in one, kept with its run, and every mistake one clear line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from orchestrator.errors import EXIT_DONE, EXIT_JOB, CheckpointError, JobError
from orchestrator.job.load import job_sha256, load_job
from tests.conftest import TINY_JOB, Command
from tests.runs import assert_same_bits, summary_of

# What `arch: vgg` builds from the same widths: bias-free convolutions with batch norms, a pooling behind the second.
GOOD = """\
import hff
from torch import nn


class Small(hff.Architecture):
    def __init__(self, widths=(8, 8, 16)):
        self.widths = widths

    @property
    def depth(self):
        return len(self.widths)

    def body(self, index, input_shape):
        width = self.widths[index]
        modules = [nn.Conv2d(input_shape[0], width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        return nn.Sequential(*modules, *([nn.MaxPool2d(2)] if index == 1 else []))
"""
OWN_JOB = TINY_JOB.replace(
    "{{arch: vgg, widths: [8, 8, 16], pool_after: [1], head_grid: 4}}", "{{file: net.py, class: Small}}"
)
TWO = ("--set", "cluster.workers=2", "--set", "cluster.stages=2")


@pytest.fixture
def own_job(tmp_path: Path, tiny_job: Callable[..., Path]) -> Callable[..., Path]:
    """A job with a network in a file beside it."""

    def write(source: str = GOOD, name: str = "own") -> Path:
        (tmp_path / "net.py").write_text(source)
        return tiny_job(name, OWN_JOB)

    return write


def test_a_network_that_is_built_like_ours_has_its_bits_in_one_process_and_in_two_stages(
    own_job: Callable[..., Path], tiny_job: Callable[..., Path], in_process: Command, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    for path, words in ((own_job(), ()), (own_job(name="piped"), TWO), (tiny_job("ours"), ())):
        done = in_process("run", path, *words)
        assert done.returncode == EXIT_DONE, done.stdout + done.stderr
    assert_same_bits(runs / "own", runs / "ours")
    assert_same_bits(runs / "piped", runs / "ours")
    assert summary_of(runs / "piped")["stages"] == 2


def test_its_run_can_be_moved_evaluated_and_exported_and_goes_on_with_the_same_code_alone(
    own_job: Callable[..., Path], in_process: Command, tmp_path: Path
) -> None:
    path = own_job()
    assert in_process("run", path).returncode == EXIT_DONE
    run = tmp_path / "runs" / "own"
    assert (run / "model.py").read_text() == GOOD
    kept = yaml.safe_load((run / "job.yaml").read_text())["model"]
    assert (kept["file"], kept["layers"]) == ("model.py", 3)
    assert in_process("run", path).returncode == EXIT_DONE

    own_job(GOOD + "# changed\n")
    done = in_process("run", path)
    assert (done.returncode, "model.sha256: was " in done.stderr) == (EXIT_JOB, True)

    (tmp_path / "net.py").unlink()
    moved = run.rename(run.with_name("moved"))
    answer = tmp_path / "eval.json"
    assert in_process("eval", moved, "--json", answer).returncode == EXIT_DONE
    assert json.loads(answer.read_text())["top1"] == summary_of(moved)["val_top1"]

    exported = in_process("export", moved, "--format", "safetensors")
    assert exported.returncode == EXIT_DONE, exported.stderr
    (moved / "model.py").unlink()
    from orchestrator.run.inference.export import load_safetensors

    with pytest.raises(CheckpointError, match="holds code of its own"):
        load_safetensors(moved / "network.safetensors")
    classifier, _ = load_safetensors(moved / "network.safetensors", run_its_code=True)
    assert [type(layer.body).__name__ for layer in classifier.layers()] == ["Sequential"] * 3


def test_options_and_code_are_the_job_and_the_place_of_the_file_is_not(
    own_job: Callable[..., Path], tmp_path: Path
) -> None:
    path = own_job()
    before = job_sha256(load_job(path))
    assert job_sha256(load_job(path, ["model.widths=[4, 4]"])) != before
    (tmp_path / "elsewhere.py").write_text(GOOD)
    assert job_sha256(load_job(path, ["model.file=elsewhere.py"])) == before
    (tmp_path / "net.py").write_text(GOOD + "# changed\n")
    assert job_sha256(load_job(path)) != before


def test_a_file_is_looked_for_by_the_rule_of_runs_and_then_beside_the_job(
    own_job: Callable[..., Path], tmp_path: Path
) -> None:
    beside = own_job()
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "jobs").mkdir()
    job = beside.rename(tmp_path / "jobs" / "own.yaml")
    assert load_job(job).model.file == str(tmp_path / "net.py")  # type: ignore[union-attr]
    (tmp_path / "net.py").rename(tmp_path / "jobs" / "net.py")
    assert load_job(job).model.file == str(tmp_path / "jobs" / "net.py")  # type: ignore[union-attr]


def test_a_plan_knows_its_layers(own_job: Callable[..., Path], in_process: Command, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    words = ("--set", "model.widths=[4, 8, 8, 8]", "--json", plan)
    assert in_process("plan", own_job(), "--workers", "2", *words).returncode == EXIT_DONE
    found = json.loads(plan.read_text())
    assert [stage["layers"] for stage in found["stages"]][-1][-1] == 3
    # Kernels and batch norms, the head of 10 x 2 prototypes of 8 x 4 x 4 numbers and its scale.
    bodies = [9 * a * b + 2 * b for a, b in ((1, 4), (4, 8), (8, 8), (8, 8))]
    heads = [20 * width * 16 + 1 for width in (4, 8, 8, 8)]
    assert sum(stage["parameters"] for stage in found["stages"]) == sum(bodies) + sum(heads)


def test_check_runs_nothing_of_the_file(own_job: Callable[..., Path], in_process: Command, tmp_path: Path) -> None:
    path = own_job(f"open({str(tmp_path / 'touched')!r}, 'w')\n" + GOOD)
    assert in_process("check", path).returncode == EXIT_DONE
    assert not (tmp_path / "touched").exists()


# Name: source, settings, message; LINE is where a job names its model.
WRONG: dict[str, tuple[str, tuple[str, ...], str]] = {
    "no such class": (
        GOOD.replace("class Small", "class Smal"),
        (),
        "JOB:6: model.class: must be a class that FILE defines at its top level (it has: Smal), got 'Small'; "
        "did you mean 'Smal'?",
    ),
    "no file": (
        GOOD,
        ("model.file=no.py",),
        "--set: model.file: must be a Python file, got no such file: FOLDER/no.py",
    ),
    "no class named": (GOOD, ("model={file: net.py}",), "--set: model.class: must be given (the name of a class in "),
    "no architecture": (
        GOOD.replace("hff.Architecture", "nn.Module"),
        (),
        "model.class: must be a subclass of hff.own_network.Architecture, got Small of FILE",
    ),
    "unknown option": (
        GOOD,
        ("model.wdiths=[4]",),
        "--set: model.wdiths: must be an option of Small of FILE (it has: widths); did you mean 'widths'?",
    ),
    "no depth": (
        GOOD.replace("len(self.widths)", "0"),
        (),
        "model: Small of FILE: depth must be a whole number >= 1, got 0",
    ),
    "a body that fails": (
        GOOD.replace("input_shape[0]", "input_shape[7]"),
        (),
        "model: Small of FILE: cannot take images of 1x8x8: FILE:15: IndexError: tuple index out of range",
    ),
    "a body that is none": (
        GOOD.replace("return nn.Sequential(*modules,", "return str((*modules,").replace("else []))", "else [])))"),
        (),
        "model: Small of FILE: cannot take images of 1x8x8: ValueError: body 0 must be a torch.nn.Module, got str",
    ),
    "an output that is no map": (
        GOOD.replace("nn.ReLU()]", "nn.ReLU(), nn.Flatten(0)]"),
        (),
        "model: Small of FILE: cannot take images of 1x8x8: ValueError: body 0 must put out (2, D), (2, C, H, W) or ",
    ),
    "images too small": (
        GOOD.replace("MaxPool2d(2)", "MaxPool2d(16)"),
        (),
        "model: Small of FILE: cannot take images of 1x8x8: RuntimeError: ",
    ),
    "more stages than bodies": (
        GOOD,
        ("cluster.stages=4", "cluster.workers=4"),
        "cluster.stages: must be at most 3, the number of layers, got 4",
    ),
    "another number of layers": (
        GOOD,
        ("model.layers=2",),
        "model.layers: must be 3, the depth of model: Small of FILE, or left out",
    ),
    "hidden convolutions": (
        GOOD,
        ("objective.aux_convs=1",),
        "--set: objective.aux_convs: must be 0 with a model file, got 1",
    ),
    "smaller images first": (
        GOOD,
        ("data.progressive={from_size: 4}",),
        "--set: data.progressive: must be left out with a backbone or a model file, got 4 pixels",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_network_that_cannot_train_is_refused_before_anything_starts(
    case: str, own_job: Callable[..., Path], in_process: Command, tmp_path: Path
) -> None:
    source, settings, message = WRONG[case]
    path = own_job(source)
    done = in_process("run", path, *(word for setting in settings for word in ("--set", setting)))
    assert done.returncode == EXIT_JOB
    (line,) = done.stderr.strip().splitlines()
    wanted = message.replace("FILE", str(tmp_path / "net.py")).replace("FOLDER", str(tmp_path))
    assert wanted.replace("JOB", str(path)) in line
    assert not (tmp_path / "runs" / "own" / "job.yaml").exists()


def test_a_submitted_job_takes_its_network_along_or_is_refused(own_job: Callable[..., Path], tmp_path: Path) -> None:
    from orchestrator.launch.clusters.submit import plan_submission

    path = own_job()
    assert "net.py" in plan_submission(str(path), []).package.files
    outside = tmp_path.parent / f"{tmp_path.name}-outside.py"
    outside.write_text(GOOD)
    with pytest.raises(JobError, match=r"model.file: must be a file of .* that is uploaded"):
        plan_submission(str(path), [f"model.file={outside}"])
