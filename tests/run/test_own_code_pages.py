"""The pages of own code, followed from the first line to the last by somebody who copies what stands there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from orchestrator.cli import main
from tests.conftest import ROOT
from tests.test_docs_commands import code_blocks, commands_of


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("page", "file", "longest", "steps", "least"),
    [("own-objective", "my_objective.py", 30, 7, 90.0), ("own-network", "my_model.py", 30, 6, 80.0)],
)
def test_the_way_to_own_code_works_as_it_is_told(
    page: str,
    file: str,
    longest: int,
    steps: int,
    least: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = (ROOT / "docs" / f"{page}.md").read_text()
    monkeypatch.chdir(tmp_path)
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    assert len(code.splitlines()) <= longest
    blocks = list(code_blocks(re.sub(r"```python\n.*?```", "", text, flags=re.DOTALL)))
    job = next(block for block in blocks if "kind: train" in block)
    Path(file).write_text(code)
    Path("my-job.yaml").write_text(job)
    commands = [step for block in blocks for step in commands_of(block)]
    assert len(commands) == steps
    for step in commands:
        assert main(shlex.split(step)[1:]) == 0, step
    compared = capsys.readouterr().out
    rows = re.findall(r"^val top-1 +([\d.]+) % +([\d.]+) % +([\d.]+) %", compared, re.MULTILINE)
    assert len(rows) == 1
    assert all(float(top1) > least for top1 in rows[0])
    run = re.search(r"^name: (\S+)", job, re.MULTILINE)
    assert run is not None
    assert main(["export", f"runs/{run[1]}", "--format", "torch-export"]) == 0
