"""docs/own-objective.md, followed from its first line to its last by somebody who copies what stands there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from orchestrator.cli import main
from tests.conftest import ROOT
from tests.test_docs_commands import code_blocks, commands_of

PAGE = (ROOT / "docs/own-objective.md").read_text()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_way_to_an_own_objective_works_as_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[0]
    assert len(code.splitlines()) <= 30
    blocks = list(code_blocks(re.sub(r"```python\n.*?```", "", PAGE, flags=re.DOTALL)))
    job = next(block for block in blocks if "kind: train" in block)
    Path("my_objective.py").write_text(code)
    Path("my-job.yaml").write_text(job)
    steps = [step for block in blocks for step in commands_of(block)]
    assert len(steps) == 7
    for step in steps:
        assert main(shlex.split(step)[1:]) == 0, step
    compared = capsys.readouterr().out
    rows = re.findall(r"^val top-1 +([\d.]+) % +([\d.]+) % +([\d.]+) %", compared, re.MULTILINE)
    assert len(rows) == 1
    assert all(float(top1) > 90 for top1 in rows[0])
