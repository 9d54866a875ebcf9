"""Workers that are more than the cores of the one machine are said, where it is one."""

from __future__ import annotations

import pytest

from orchestrator.cli import main
from orchestrator.run import planning
from orchestrator.run.planning import sharing_note
from tests.conftest import ROOT


@pytest.mark.parametrize(("workers", "cores"), [(2, 2), (1, 2), (3, None)])
def test_workers_with_a_core_each_or_on_a_cluster_need_no_note(workers: int, cores: int | None) -> None:
    assert sharing_note(workers, cores) is None


@pytest.mark.parametrize(("address", "says"), [(None, True), ("ray://somewhere:10001", False)])
def test_plan_says_that_workers_share_the_cores_of_this_machine(
    address: str | None, says: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address is not None:
        monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(planning.os, "cpu_count", lambda: 2)
    settings = ("cluster.launcher=ray", "cluster.use_gpu=false")
    flags = [word for setting in settings for word in ("--set", setting)]
    assert main(["plan", "jobs/quickstart.yaml", "--workers", "3", *flags]) == 0
    note = "note: 3 workers share 2 cores of this machine; the prediction assumes a core for each\n"
    assert (note in capsys.readouterr().out) == says


@pytest.mark.parametrize(("stages", "says"), [(1, "one layer learns at a time"), (2, "stages behind it idle")])
def test_plan_says_which_stages_idle_where_one_layer_learns_after_the_other(
    stages: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("plan", str(ROOT / "jobs" / "quickstart.yaml"), "--set", f"cluster.workers={stages}")
    words = (*words, "--set", f"cluster.stages={stages}")
    assert main(words) == 0
    assert "sequential" not in capsys.readouterr().out
    assert main([*words, "--set", "train.schedule=sequential"]) == 0
    assert says in capsys.readouterr().out
