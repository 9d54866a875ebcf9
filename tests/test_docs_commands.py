"""Every command that the documentation shows can be given as it stands there; the cheap ones are given.

A line of a code block, or an inline code span, that begins with the name of a program is a command. Those of this
project are parsed by its own parser, with job files and `--set` as `orchestrator check` would read them; of others it
is checked that the files, targets, modules and extras that they name are there. Clouds are not asked.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import re
import shlex
import shutil
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from orchestrator.cli import main, make_parser
from orchestrator.errors import OrchestratorError
from orchestrator.examples import EXAMPLES, commands
from orchestrator.job.load import load_any
from tests.conftest import ROOT, Command
from tests.test_docs import PAGES

OURS = ("orchestrator", "make", "python", "pip", "cp")
# Of others, with the words of theirs that our documents use.
OTHERS = {
    "ray": {"job", "start", "up", "down", "attach", "get-auth-token", "stop"},
    "mlflow": {"ui", "models", "server"},
    "docker": {"build", "run", "tag", "push", "compose"},
    "kubectl": {"apply", "create", "-n"},
    "curl": None, "source": None, "scontrol": None, "scancel": None, "sbatch": None, "git": None,
}  # fmt: skip
# Files that a reader makes.
READERS = {"JOB", "jobs/mine.yaml", "pretrain.yaml", "flowers.yaml", "jobs/x.yaml", "jobs/NAME.yaml", "my-job.yaml"}
JOBS = sorted((ROOT / "jobs").glob("*.yaml"))
_SPAN = re.compile(r"`([^`\n]+)`")
_PLACEHOLDER = re.compile(r"[\[|]|\.\.\.|…")


@dataclass(frozen=True)
class Shown:
    """A command and where it is shown."""

    place: str
    text: str

    def __str__(self) -> str:
        return f"{self.place} {self.text}"


def code_blocks(text: str) -> Iterator[str]:
    """Indented and fenced blocks, without their indentation."""
    text = re.sub(r"^```\w*\n(.*?)^```$", lambda m: re.sub(r"^", "    ", m[1], flags=re.M), text, flags=re.M | re.S)
    for block in re.findall(r"(?:^ {4}.*\n|^\s*\n)+", text, re.MULTILINE):
        yield "\n".join(line.strip() if line[:8].isspace() else line[4:] for line in block.splitlines())


def commands_of(block: str) -> Iterator[str]:
    """The commands among the lines of a block, each on one line and without what is said about it."""
    for line in block.replace("\\\n", " ").splitlines():
        line = re.sub(r"\s+#\s.*", "", line.strip()).removeprefix("$ ").removeprefix("# ")
        for part in re.split(r" && ", line):
            word = part.split(" ")[0]
            if word in OURS or word in OTHERS or word in near_misses(part):
                yield re.split(r" > | \| ", part)[0].strip()


def near_misses(line: str) -> list[str]:
    """Words at the beginning of a line that are a program's name with a slip in it."""
    word = line.split(" ")[0]
    near = difflib.get_close_matches(word, ["orchestrator", "kubectl", "docker"], n=1, cutoff=0.85)
    return [word] if near and word != near[0] and " " in line else []


def shown() -> list[Shown]:
    found: list[Shown] = []
    for page in PAGES:
        text, name = page.read_text(), str(page.relative_to(ROOT))
        if name == "CHANGELOG.md":
            continue
        found += [Shown(name, c) for block in code_blocks(text) for c in commands_of(block)]
        spans = [span for span in _SPAN.findall(text) if span.split(" ")[0] in ("orchestrator", "make", "python")]
        found += [Shown(name, span) for span in spans if " " in span]
    for job in JOBS:
        header = re.split(r"^[^#]", job.read_text(), maxsplit=1, flags=re.MULTILINE)[0]
        lines = "\n".join(line[1:].strip() for line in header.splitlines() if line.startswith("#   "))
        found += [Shown(f"jobs/{job.name}", c) for c in commands_of(lines)]
    found += [Shown(f"{name or 'orchestrator'} --help", c) for name, text in EXAMPLES.items() for c in examples(text)]
    return list(dict.fromkeys(found))


def examples(text: str) -> Iterator[str]:
    """The commands of a help text, without what stands beside them."""
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        if line.startswith("  orchestrator "):
            yield re.split(r" > | {2,}", line.strip())[0]


SHOWN = shown()


def fault(command: str) -> str | None:
    """What is wrong with a command, None when it can be given."""
    program, *words = shlex.split(command)
    if program == "orchestrator":
        return _ours(words)
    if program == "make":
        targets = {".venv/.installed", *re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)}
        return next((f"no target {word}" for word in words if word not in targets), None)
    if program == "python":
        return _module(words)
    if program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        named = re.findall(r"hff-orchestrator\[(\w+)\]", command)
        return next((f"no extra {extra}" for extra in named if extra not in extras), None)
    if program not in (*OURS, *OTHERS):
        return f"no program {program}"
    known = OTHERS.get(program)
    if known is not None and words[0] not in known:
        return f"{program} has no {words[0]}"
    files = [w for word in words for w in [word.rpartition("=")[2]] if re.match(r"(infra|jobs)/", w)]
    mine = [name.replace(".mine", "") for name in files]
    return next((f"no file {name}" for name in mine if name not in READERS and not (ROOT / name).exists()), None)


def _module(words: list[str]) -> str | None:
    if words[:1] != ["-m"]:
        return None if words and (ROOT / words[0]).exists() else "python runs a module here: -m"
    try:
        found = importlib.util.find_spec(words[1])
    except ModuleNotFoundError:
        found = None
    if found is None or found.origin is None:
        return f"no module {words[1]}"
    source = Path(found.origin).read_text()
    return next((f"{words[1]} has no {w}" for w in words[2:] if w.startswith("--") and w not in source), None)


def _ours(words: list[str]) -> str | None:
    if " ".join(words) in dict(commands(make_parser())):
        return None  # it is spoken of
    if any(_PLACEHOLDER.search(word) for word in words):
        return _usage(words)
    try:
        arguments = make_parser().parse_args(words)
    except OrchestratorError as error:
        return str(error)
    except SystemExit:
        return None  # --help
    job = getattr(arguments, "job", None)
    if job is None or job in READERS or job.startswith("runs/"):
        return None
    try:
        load_any(ROOT / job, arguments.overrides)
    except OrchestratorError as error:
        return str(error)
    return None


def _usage(words: list[str]) -> str | None:
    """A pattern for commands: its command must be there, and every flag that it shows."""
    known = dict(commands(make_parser()))
    at = next((n for n in (2, 1) if " ".join(words[:n]) in known), 0)
    names = [re.split(r"[|\\]+", word) for word in words[: max(at, 1)]]
    if not at and not all(name in known for name in names[0]):
        return f"no command {words[0]}"
    flags = set(re.findall(r"--[\w-]+", " ".join(words)))
    if not at:
        return None
    have = {o for action in known[" ".join(words[:at])]._actions for o in action.option_strings}
    return next((f"no flag {flag}" for flag in sorted(flags) if flag not in have), None)


@pytest.mark.parametrize("command", SHOWN, ids=str)
def test_a_command_can_be_given_as_it_is_shown(command: Shown) -> None:
    assert fault(command.text) is None


def test_the_commands_of_all_documents_were_found() -> None:
    places = {command.place for command in SHOWN}
    assert {"README.md", "docs/clusters.md", "infra/kuberay/README.md", "jobs/imagenet.yaml", "run --help"} <= places
    assert len(SHOWN) > 120


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("orchestrator rnu jobs/quickstart.yaml", "invalid choice: 'rnu'"),
        ("orchestrator run jobs/quickstrat.yaml", "no such file; did you mean"),
        ("orchestrator run jobs/quickstart.yaml --set train.lrr=1", "must be a key of a job"),
        ("orchestrator run jobs/quickstart.yaml --set train.lr=-1", "must be > 0"),
        ("orchestrator plan jobs/imagenet.yaml --worker 8,x --jsn x", "unrecognized arguments: --jsn"),
        ("orchestrator data pakc my-images/ data/mine", "invalid choice: 'pakc'"),
        ("orchestrator submit JOB [--too ray|kuberay]", "no flag --too"),
        ("orchestrater run jobs/quickstart.yaml", "no program orchestrater"),
        ("make quikstart", "no target quikstart"),
        ("python -m benchmarks.nothing", "no module benchmarks.nothing"),
        ("python -m benchmarks.plan --fulll", "benchmarks.plan has no --fulll"),
        ("pip install 'hff-orchestrator[onxn]'", "no extra onxn"),
        ("ray jbo submit jobs/imagenet.yaml", "ray has no jbo"),
        ("ray job submit jobs/imagenett.yaml", "no file jobs/imagenett.yaml"),
        ("kubectl apply -f infra/kuberay/namespce.yaml", "no file infra/kuberay/namespce.yaml"),
    ],
)
def test_a_slip_in_a_command_is_caught(command: str, said: str) -> None:
    block = f"    {command}     # what it does\n"
    assert [*commands_of(next(code_blocks(block)))] == [command], "it is seen to be a command"
    assert said in (fault(command) or "")


def test_every_command_ends_its_help_with_examples() -> None:
    parser = make_parser()
    without = [
        name
        for name, command in commands(parser)
        if not any(isinstance(a, argparse._SubParsersAction) for a in command._actions) and name not in EXAMPLES
    ]
    assert without == []
    assert all(EXAMPLES[name] in command.format_help() for name, command in commands(parser) if name in EXAMPLES)


def harmless(command: Shown) -> bool:
    """Whether a command only looks at a job of ours, or shows what it would send."""
    words = shlex.split(command.text)
    if words[0] != "orchestrator" or any(_PLACEHOLDER.search(w) for w in words) or not READERS.isdisjoint(words):
        return False
    if len(words) < 3:
        return False
    return words[1] in ("check", "plan") or (words[1] == "submit" and "--dry-run" in words)


@pytest.mark.parametrize("text", sorted({c.text for c in SHOWN if harmless(c)}))
def test_what_only_looks_is_given(text: str, in_process: Command, tmp_path: Path) -> None:
    words = shlex.split(text)[1:]
    if "--json" in words:
        words[words.index("--json") + 1] = str(tmp_path / "out.json")
    result = in_process(*words)
    assert result.returncode == 0, result.stderr


def jobs_shown() -> list[tuple[str, str]]:
    """Blocks that are whole job files."""
    whole = re.compile(r"(?:#!.*\n)?kind: \w+\n(?=(?:.*\n)*?name: )")
    return [
        (f"{page.relative_to(ROOT)} {number}", block)
        for page in PAGES
        for number, block in enumerate(code_blocks(page.read_text()))
        if whole.match(block.lstrip("\n"))
    ]


@pytest.mark.parametrize(("place", "text"), jobs_shown(), ids=[place for place, _ in jobs_shown()])
def test_a_job_that_is_shown_whole_is_valid(place: str, text: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "jobs", tmp_path / "jobs")
    code = re.findall(r"^```python\n(.*?)^```", (ROOT / place.split(" ")[0]).read_text(), re.MULTILINE | re.DOTALL)
    for file in ("my_objective.py", "my_model.py"):
        (tmp_path / file).write_text("\n".join(code))
    (tmp_path / "x.yaml").write_text(text.lstrip("\n"))
    assert load_any(tmp_path / "x.yaml").name


@pytest.mark.slow
def test_the_way_from_own_images_to_a_prediction_works_as_the_readme_tells_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.data.conftest import encoded, noise

    monkeypatch.chdir(tmp_path)
    for label in ("cat", "dog"):
        (tmp_path / "my-images" / label).mkdir(parents=True)
        for i in range(60):
            (tmp_path / "my-images" / label / f"{i}.png").write_bytes(encoded(noise(i)))
    shutil.copytree(ROOT / "jobs", tmp_path / "jobs")
    (tmp_path / "pyproject.toml").touch()
    section = (ROOT / "README.md").read_text().split("## Your own images")[1].split("\n## ")[0]
    block = next(code_blocks(section.partition("\n")[2]))
    steps = list(commands_of(block))
    assert [step.split(" ")[:2][-1] for step in steps] == ["data", "data", "jobs/own-images.yaml", "check", "run"]
    for step in steps:
        program, *words = shlex.split(step)
        if program == "cp":
            _write_the_copy(*map(Path, words))
        else:
            assert main(words) == 0, step
    assert main(["predict", "runs/mine", "my-images/cat/0.png"]) == 0


def _write_the_copy(job: Path, copy: Path) -> None:
    """The copy as the section below the block says, and with a network and a launcher for a test."""
    text = job.read_text()
    changes = [
        (r"name: \S+", "name: mine"), (r"train: data/\S+", "train: data/mine"),
        (r"widths: .*", "widths: [8, 8]"), (r"pool_after: .*", "pool_after: [0]"),
        (r"epochs: \d+", "epochs: 1"), (r"global_batch_size: \d+", "global_batch_size: 12"),
        (r"cluster: .*", "cluster: {launcher: process}"),
    ]  # fmt: skip
    for old, new in changes:
        text, count = re.subn(old, new, text, count=1)
        assert count == 1, old
    copy.write_text(text)
