"""The command line as a user calls it: exit codes, messages, and how fast the light commands answer."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.cli import main
from tests.conftest import ROOT, Command


def child_seconds() -> float:
    """Processor time of all finished child processes: what a command needs, whatever else the machine does."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_help_is_fast_and_shows_examples(orchestrator: Command) -> None:
    before = child_seconds()
    result = orchestrator("--help")
    assert result.returncode == 0
    assert "orchestrator run jobs/quickstart.yaml" in result.stdout
    assert "exit codes:" in result.stdout
    assert child_seconds() - before < 0.5


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_shell_gets_a_script_that_completes_commands_flags_and_files(
    shell: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for word in ("quickstart", "stats", "--dry-run", "kuberay", "replay"):
        assert (word in script) is (word != "quickstart"), word


def test_bash_completes_with_the_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "completion"
    script.write_text(capsys.readouterr().out)

    def completed(*words: str) -> set[str]:
        line = (
            f"source {script}; COMP_WORDS=(orchestrator {' '.join(words)}); COMP_CWORD={len(words)}; "
            "$(complete -p orchestrator | sed 's/.*-F \\([^ ]*\\).*/\\1/') orchestrator; echo ${COMPREPLY[@]}"
        )
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=ROOT, check=True)
        return {word.strip() for word in done.stdout.split()}

    assert {"plan", "predict"} <= completed("p")
    assert completed("data", "ver") == {"verify"}
    assert "--workers" in completed("plan", "--w")
    assert "jobs/quickstart.yaml" in completed("run", "jobs/qu")


def test_check_answers_offline_in_two_seconds_without_torch() -> None:
    code = (
        "import sys; from orchestrator.cli import main; code = main(['check', 'jobs/imagenet.yaml']); "
        "heavy = {'torch', 'ray', 'mlflow'} & set(sys.modules); sys.exit(code or len(heavy))"
    )
    before = child_seconds()
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert child_seconds() - before < 2


def test_plan_of_imagenet_names_what_each_of_eight_stages_does_without_torch(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    code = (
        "import sys; from orchestrator.cli import main; "
        f"code = main(['plan', 'jobs/imagenet.yaml', '--workers', '8', '--json', {str(out)!r}]); "
        "sys.exit(code or len({'torch', 'ray', 'mlflow'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    plan = json.loads(out.read_text())
    assert plan["steps_per_epoch"] == -(-1_281_167 // plan["global_batch_size"])
    assert len(plan["stages"]) == 8
    assert set(plan["stages"][0]) == {
        "index", "layers", "replicas", "parameters", "memory_bytes", "compute_share", "bytes_sent_per_step",
    }  # fmt: skip
    assert sum(stage["compute_share"] for stage in plan["stages"]) == pytest.approx(1)
    assert all(stage["bytes_sent_per_step"] > 0 for stage in plan["stages"][:-1])


def test_links_of_bfloat16_halve_what_the_plan_says_is_sent_but_in_shared_memory(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"

    def sent(*settings: str) -> float:
        """Bytes of activations behind the first layer, for each image; a label has 8 more."""
        fixed = ("train.precision=float32", "cluster.stages=2", "cluster.layers=[1, 9]", *settings)
        flags = [word for setting in fixed for word in ("--set", setting)]
        assert main(["plan", str(ROOT / "jobs/imagenet.yaml"), "--workers", "2", "--json", str(out), *flags]) == 0
        plan = json.loads(out.read_text())
        return float(plan["stages"][0]["bytes_sent_per_step"] / plan["global_batch_size"] - 8)

    exact = sent()
    assert sent("train.link_precision=bfloat16") == exact / 2
    assert sent("train.link_precision=bfloat16", "cluster.transport=shm") == exact


def test_several_numbers_of_workers_give_a_list_of_plans(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    assert main(["plan", str(ROOT / "jobs/imagenet.yaml"), "--workers", "1,2", "--json", str(out)]) == 0
    assert [plan["workers"] for plan in json.loads(out.read_text())] == [1, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["zz"], "argument COMMAND: invalid choice: 'zz' (choose from run, check, plan, submit, data, eval,"),
        (["rnu", "jobs/quickstart.yaml"], "invalid choice: 'rnu'; did you mean run?; see orchestrator --help\n"),
        (["trian", "jobs/quickstart.yaml"], "invalid choice: 'trian'; did you mean run?"),
        (["ls"], "invalid choice: 'ls'; did you mean runs ls?"),
        (["data", "pakc"], "argument ACTION: invalid choice: 'pakc'; did you mean pack?; see orchestrator data --help"),
        (["runs", "shwo", "x"], "invalid choice: 'shwo'; did you mean show?"),
        (
            ["run", "jobs/quickstart.yaml", "--sett", "a.b=c"],
            "unrecognized arguments: --sett a.b=c; did you mean --set?; see orchestrator run --help\n",
        ),
        (
            ["run", "jobs/quickstart.yaml", "--lr", "3"],
            "unrecognized arguments: --lr 3; did you mean --set train.lr=3?; see orchestrator run --help\n",
        ),
        (["check", "jobs/quickstart.yaml", "--batch-size=64"], "did you mean --set train.global_batch_size=64?; see"),
        (["plan", "jobs/quickstart.yaml", "--train.epochs"], "did you mean --set train.epochs=VALUE?; see"),
        (["plan", "jobs/quickstart.yaml", "--name", "x"], "did you mean --set name=x?; see"),
        (["run", "jobs/quickstart.yaml", "--train", "x"], "did you mean --set data.train=x?; see"),
        (["runs", "show", "x", "--lr", "3"], "unrecognized arguments: --lr 3; see orchestrator runs show --help\n"),
        (["data", "pack", "a", "--lr"], "the following arguments are required: OUT; see orchestrator data pack --help"),
        (["data", "stats", "OUT", "--htlm=x"], "--htlm=x; did you mean --html?; see orchestrator data stats --help"),
        (["check", "jobs/quickstart.yaml", "--zzz"], "unrecognized arguments: --zzz; see orchestrator check --help"),
        (["run"], "the following arguments are required: JOB"),
        (["run", "jobs/quickstart.yaml", "--resume", "maybe"], "invalid choice: 'maybe'"),
        (["run", "jobs/quickstart.yaml", "--seeds", "1,x"], "--seeds: must be different whole numbers >= 0"),
        (["plan", "jobs/imagenet.yaml", "--workers", "0"], "--workers: must be different whole numbers >= 1"),
        (["plan", "jobs/imagenet.yaml", "--workers", "7", "--set", "cluster.stages=8"], "nearest: 8"),
        (["plan", "jobs/imagenet.yaml", "--workers", "11", "--set", "cluster.stages=2"], "nearest: 10 and 12"),
        (["plan", "jobs/imagenet.yaml", "--price-per-hour", "cheap"], "--price-per-hour: must be a number >= 0"),
        (
            ["plan", "jobs/imagenet.yaml", "--set", "cluster.memory_gb=1"],
            "no split of the 10 layers among 8 workers fits",
        ),
        (["runs", "ls", "nowhere"], "nowhere: no such folder of runs"),
    ],
)
def test_a_bad_command_says_what_is_wrong_and_exits_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert message in said
    if "--help" in said:
        assert said.count("\n") == 1, "one line"


@pytest.mark.parametrize(
    "words",
    [
        ["eval", "jobs"],
        ["predict", "jobs", "x.png"],
        ["export", "jobs", "--format", "safetensors"],
        ["report", "jobs"],
        ["report", "jobs", "docs"],
        *(["runs", action, "jobs"] for action in ("show", "verify", "replay")),
        ["runs", "compare", "jobs", "docs"],
        ["runs", "rm", "jobs", "--yes"],
    ],
    ids=" ".join,
)
def test_what_is_no_run_is_refused_by_every_command_in_the_same_words(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(words) == 4
    assert capsys.readouterr().err == "jobs: not a run folder (no job.yaml in it); give RUNS/NAME\n"


@pytest.mark.parametrize("command", [["predict", "{}", "a.png"], ["report", "{}"], ["runs", "show", "{}"]])
@pytest.mark.parametrize(
    ("there", "says"),
    [
        ([], "there are no runs in runs"),
        (["quickstart", "mnist"], "did you mean runs/quickstart?"),
        (["mnist", "cifar10"], "runs in runs: cifar10, mnist"),
        ([f"mnist-{i}" for i in range(9)], f"runs in runs: {', '.join(f'mnist-{i}' for i in range(8))} and 1 more"),
    ],
)
def test_a_run_that_is_not_there_is_said_with_those_that_are(
    command: list[str],
    there: list[str],
    says: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in there:
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "job.yaml").touch()
    assert main([word.format("runs/quickstrat") for word in command]) == 4
    assert capsys.readouterr().err == f"runs/quickstrat: there is no such folder; {says}\n"
    if there:  # by its bare name it is looked for in the same place
        assert main([word.format("quickstrat") for word in command]) == 4
        assert capsys.readouterr().err == f"runs/quickstrat: there is no such folder; {says}\n"


def test_a_bad_job_ends_with_its_message_alone_and_exit_code_2(orchestrator: Command) -> None:
    result = orchestrator("run", "jobs/quickstart.yaml", "--set", "train.lr=-1")
    assert result.returncode == 2
    assert result.stderr.strip() == "--set: train.lr: must be > 0, got -1"
    assert result.stdout == ""


def test_data_that_are_not_there_are_exit_code_3_with_the_remedy(
    tiny_job: Callable[..., Path], in_process: Command, tmp_path: Path
) -> None:
    flags = ["--set", f"data={{train: {tmp_path / 'nothing'}, image_size: 8, channels: 1}}"]
    result = in_process("run", tiny_job(), *flags)
    assert result.returncode == 3
    assert "data.train:" in result.stderr
    assert "orchestrator data pack SOURCE" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_runs_folder_that_cannot_be_written_is_named(
    tiny_job: Callable[..., Path], in_process: Command, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    result = in_process("run", tiny_job(), "--set", f"runs={tmp_path / 'file' / 'runs'}")
    assert result.returncode == 2
    assert "runs: must be a folder that can be written" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_run_whose_folder_is_a_file_is_refused_and_the_file_stays(
    tiny_job: Callable[..., Path], in_process: Command, tmp_path: Path
) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "tiny").write_text("in the way")
    result = in_process("run", tiny_job())
    assert result.returncode == 2
    said = f"name: must be that of a folder in runs, got {tmp_path / 'runs' / 'tiny'}, a file; give another name\n"
    assert result.stderr == said
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["tiny"]


@pytest.mark.parametrize("place", ["file/mlflow.db", "folder"])
def test_a_tracking_database_that_cannot_be_written_is_named_before_the_run_begins(
    tiny_job: Callable[..., Path], in_process: Command, tmp_path: Path, place: str
) -> None:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder").mkdir()
    uri = f"sqlite:///{tmp_path / place}"
    result = in_process("run", tiny_job(), "--set", f"tracking.uri={uri}")
    assert result.returncode == 2
    first, remedy = result.stderr.splitlines()
    assert first.startswith(f"tracking.uri: {uri} cannot be used: ")
    assert "correct tracking.uri, or leave it out to track in a database beside the runs" in remedy
    assert not (tmp_path / "runs" / "tiny").exists()


def test_resume_must_without_a_checkpoint_is_exit_code_4(tiny_job: Callable[..., Path], in_process: Command) -> None:
    result = in_process("run", tiny_job(), "--resume", "must")
    assert result.returncode == 4
    assert "there is no checkpoint to resume from" in result.stderr


@pytest.mark.parametrize("torchrun", [False, True])
def test_gpus_that_are_not_there_are_refused(
    tiny_job: Callable[..., Path], in_process: Command, monkeypatch: pytest.MonkeyPatch, torchrun: bool
) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    if torchrun:
        for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("MASTER_PORT", "1")  # nobody is asked there
    result = in_process("run", tiny_job(), "--set", "cluster.use_gpu=true")
    assert result.returncode == 2
    assert result.stderr.startswith("--set: cluster.use_gpu: must be false here, got true: ")


def test_a_plan_for_many_workers_shows_where_it_stops_scaling(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "plans.json"
    flags = ["--workers", "1,2,64,1024", "--price-per-hour", "2.5", "--json", str(out)]
    assert main(["plan", str(ROOT / "jobs/imagenet.yaml"), *flags]) == 0
    plans = json.loads(out.read_text())
    assert [sum(stage["replicas"] for stage in plan["stages"]) for plan in plans] == [1, 2, 64, 1024]
    rates = [plan["images_per_second"] for plan in plans]
    assert rates == sorted(rates)
    assert [plan["efficiency"] for plan in plans] == pytest.approx(
        [rate / rates[0] / n for rate, n in zip(rates, [1, 2, 64, 1024], strict=True)]
    )
    assert plans[-1]["limiting_factor"] == "sums over replicas"
    shown = capsys.readouterr().out
    for words in ("images/s", "scaling", "hours", "memory", "sums over replicas"):
        assert words in shown
    hours = plans[1]["worker_hours_per_epoch"]
    assert f"{2.5 * hours:.2f}" in shown


def test_a_plan_may_be_measured_on_this_machine(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["plan", "jobs/quickstart.yaml", "--profile", "--set", "train.global_batch_size=8"]) == 0
    assert "Layers measured here." in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        ("run", "jobs/quickstart.yaml", "--summary"),
        ("plan", "jobs/imagenet.yaml", "--json"),
        ("eval", "runs/a", "--json"),
        ("predict", "runs/a", "a.jpg", "--json"),
        ("report", "runs/a", "--out"),
        ("data", "stats", "out", "--html"),
    ],
)
def test_a_result_that_could_not_be_written_is_refused_before_any_work(
    words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "no" / "result"
    assert main([*words, str(place)]) == 2
    told = f"argument {words[-1]}: must be a file in a folder that is there and can be written, got {place}"
    assert capsys.readouterr().err.startswith(told)


def test_ctrl_c_ends_a_command_with_a_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def pressed(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.open", pressed)
    assert main(["check", str(ROOT / "jobs" / "quickstart.yaml")]) == 75
    said = "interrupted; the same command starts again, or goes on from what was saved\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    "words", [["eval", "RUN"], ["predict", "RUN", "a.png"], ["export", "RUN", "--format", "safetensors"],
              ["runs", "compare", "RUN", "RUN"]], ids=lambda words: words[0],
)  # fmt: skip
@pytest.mark.parametrize(
    ("summary", "says"),
    [('{"best": {"name": "s-003"}}', "its best: RUN/trials/s-003"), (None, "they lie in RUN/trials")],
)
def test_a_search_in_place_of_a_network_is_refused_with_the_run_that_is_meant(
    words: list[str], summary: str | None, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "s"
    run.mkdir()
    (run / "job.yaml").write_text("kind: search\n")
    (run / "search.json").write_text("{}")
    if summary is not None:
        (run / "summary.json").write_text(summary)
    assert main([str(run) if word == "RUN" else word for word in words]) == 4
    said = f"RUN: is a search, not one network; give one of its trials, {says}\n"
    assert capsys.readouterr().err == said.replace("RUN", str(run))
