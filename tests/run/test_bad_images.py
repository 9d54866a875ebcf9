"""The budget for images that cannot be decoded is that of the whole run, however many workers share an epoch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.data.packing.pack import pack
from orchestrator.errors import EXIT_DATA, EXIT_DONE
from tests.conftest import TINY_JOB, Command
from tests.data.conftest import PNG_END, encoded, noise, write_tar
from tests.runs import summary_of

BAD = b"\x89PNG\r\n\x1a\n and nothing else" + PNG_END
JOB = TINY_JOB.replace("data: digits", "data: {{train: {train}, image_size: 8, bad_sample_budget: 0.075}}").replace(
    "global_batch_size: 100", "global_batch_size: 10"
)


@pytest.mark.parametrize(("bad", "code"), [(3, EXIT_DONE), (4, EXIT_DATA)])
def test_two_workers_leave_out_no_more_images_together_than_one_may(
    bad: int, code: int, tiny_job: Callable[..., Path], in_process: Command, tmp_path: Path
) -> None:
    good = [encoded(noise(i, 8, 8)) for i in range(40 - bad)]
    images = [(f"{'ab'[i % 2]}/{i:02d}.png", data) for i, data in enumerate([*good, *[BAD] * bad])]
    pack(write_tar(tmp_path / "x.tar", images), tmp_path / "set")
    job = tiny_job("budget", JOB.replace("{train}", str(tmp_path / "set")))
    done = in_process("run", job, "--set", "cluster.workers=2")
    assert done.returncode == code, done.stdout + done.stderr
    if code == EXIT_DONE:
        assert summary_of(tmp_path / "runs" / "budget")["skipped_samples"] == 2 * bad, "in each of two epochs"
    else:
        assert "4 images of this epoch cannot be decoded, data.bad_sample_budget allows 3:\n  key " in done.stderr


def test_images_in_quarantine_use_up_nothing_of_the_budget_of_a_run(
    tiny_job: Callable[..., Path], in_process: Command, tmp_path: Path
) -> None:
    good = [encoded(noise(i, 8, 8)) for i in range(36)]
    images = [(f"{'ab'[i % 2]}/{i:02d}.png", data) for i, data in enumerate([*good, *[BAD] * 4])]
    place = pack(write_tar(tmp_path / "x.tar", images), tmp_path / "set").folder
    assert in_process("data", "verify", place, "--decode", "--fix").returncode == EXIT_DONE
    done = in_process("run", tiny_job("known", JOB.replace("{train}", str(place))), "--set", "data.bad_sample_budget=0")
    assert done.returncode == EXIT_DONE, done.stdout + done.stderr
    assert summary_of(tmp_path / "runs" / "known")["skipped_samples"] == 2 * 4


def test_an_image_in_quarantine_that_is_evaluated_on_ends_a_run_before_its_first_step(
    tiny_job: Callable[..., Path], in_process: Command, tmp_path: Path
) -> None:
    images = [(f"{'ab'[i % 2]}/{i:02d}.png", BAD if i == 7 else encoded(noise(i, 8, 8))) for i in range(20)]
    place = pack(write_tar(tmp_path / "x.tar", images), tmp_path / "set").folder
    fixed = in_process("data", "verify", place, "--decode", "--fix")
    assert fixed.returncode == EXIT_DONE
    assert "Evaluation (data.val, data.test) leaves none out: pack those data again" in fixed.stdout
    data = f"data={{train: {place}, val: {place}, image_size: 8}}"
    done = in_process("run", tiny_job("tiny", JOB.replace("{train}", str(place))), "--set", data)
    assert done.returncode == EXIT_DATA
    assert f"data.val: {place}: 1 of its images are in quarantine.json (first: key 0000000" in done.stderr
    assert "evaluation leaves none out: pack the data again without them" in done.stderr
    assert not (tmp_path / "runs" / "tiny" / "events.jsonl").exists()
