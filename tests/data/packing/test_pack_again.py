"""Packing in several processes, after kills, with smaller images: the same bytes as in one go."""

from __future__ import annotations

import errno
import gzip
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from orchestrator.data import command
from orchestrator.data.index import Index
from orchestrator.data.packing.pack import pack
from orchestrator.data.packing.reencode import Encoding
from orchestrator.data.parallel import cores, worth
from orchestrator.data.reader import ShardReader
from orchestrator.errors import DataError, Interrupted, JobError, OrchestratorError
from tests.conftest import ROOT, Command, environment
from tests.data.conftest import Files, encoded, noise, tar_bytes, write_tar


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def source(images: Files, tmp_path: Path) -> Path:
    return write_tar(tmp_path / "small.tar", images)


def test_several_processes_write_the_same_bytes(source: Path, small: Index, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    pack(source, tmp_path / "out", shard_bytes=6000, jobs=2, progress=lambda *call: calls.append(call))
    assert files_of(tmp_path / "out") == files_of(small.folder)
    assert calls[0] == (0, 12)
    assert calls[-1] == (12, 12)
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_an_error_in_another_process_is_the_same_one(images: Files, tmp_path: Path) -> None:
    source = write_tar(tmp_path / "x.tar", [*images, ("b/page.jpg", b"<html>404</html>")])
    with pytest.raises(DataError, match=r"x\.tar: b/page\.jpg: neither JPEG nor PNG by its first bytes"):
        pack(source, tmp_path / "out", shard_bytes=1500, jobs=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.packing", "x.tar"]


class _Killed(BaseException):
    """Nothing of ours catches it, as nothing catches SIGKILL."""


@pytest.mark.parametrize("at", range(1, 13))
def test_a_pack_that_was_stopped_at_any_image_goes_on_to_the_same_bytes(
    source: Path, small: Index, tmp_path: Path, at: int
) -> None:
    def stop(done: int, total: int) -> None:
        if done == at:
            raise _Killed

    out, told = tmp_path / "out", list[str]()
    with pytest.raises(_Killed):
        pack(source, out, shard_bytes=6000, progress=stop)
    assert not out.exists()
    finished = len(list(tmp_path.glob(".out.packing/*.json")))
    calls: list[int] = []
    pack(source, out, shard_bytes=6000, progress=lambda done, total: calls.append(done), say=told.append)
    assert files_of(out) == files_of(small.folder)
    kept = int(small.members["shard"].searchsorted(finished))
    assert calls == list(range(kept, 13)), "what was finished is not written again"
    assert told == ([f"{finished} of {len(small.shards)} shards are there already"] if finished else [])
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_shards_of_another_plan_or_half_a_shard_are_not_used(source: Path, small: Index, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == 10:
            raise _Killed

    out, work = tmp_path / "out", tmp_path / ".out.packing"
    with pytest.raises(_Killed):
        pack(source, out, shard_bytes=3000, progress=stop)
    assert list(work.glob("*.json"))
    (work / "shards" / ".shard-000000.tar.1.tmp").write_bytes(b"half")
    with pytest.raises(_Killed):
        pack(source, out, shard_bytes=6000, progress=stop)
    whole = sorted(work.glob("shards/shard*"))[0]
    whole.write_bytes(whole.read_bytes()[:-512])
    assert pack(source, out, shard_bytes=6000).sha256 == small.sha256
    assert files_of(out) == files_of(small.folder)


def test_a_source_that_changed_is_packed_afresh(source: Path, images: Files, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == 10:
            raise _Killed

    with pytest.raises(_Killed):
        pack(source, tmp_path / "out", shard_bytes=3000, progress=stop)
    others = [(name, encoded(noise(1000 + i))) for i, (name, _) in enumerate(images)]
    write_tar(source, others)
    index = pack(source, tmp_path / "out", shard_bytes=3000)
    found = sorted(ShardReader(index).read(i)[2] for i in range(12))
    assert found == sorted(data for _, data in others)


def test_a_killed_command_leaves_no_process_and_goes_on(tmp_path: Path) -> None:
    rows = [(f"{label}/{i}.png", encoded(noise(i, 80, 60))) for label in "ab" for i in range(600)]
    source, out = write_tar(tmp_path / "x.tar", rows), tmp_path / "out"
    arguments = ["data", "pack", str(source), str(out), "--shard-size", "1", "--jobs", "2"]
    process = subprocess.Popen([sys.executable, "-m", "orchestrator", *arguments], cwd=ROOT, env=environment())
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".out.packing/*.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL
    assert not out.exists()
    while any(_runs(pid) for pid in children):
        assert time.monotonic() < deadline, f"processes {children} are left behind"
        time.sleep(0.05)
    kept = len(list(tmp_path.glob(".out.packing/*.json")))
    told: list[str] = []
    again = pack(source, out, shard_bytes=2**20, say=told.append)
    assert told == [f"{kept} of {len(again.shards)} shards are there already"]
    pack(source, tmp_path / "other", shard_bytes=2**20)
    assert files_of(out) == files_of(tmp_path / "other")


def _runs(pid: str) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False


def test_a_killed_worker_is_told_and_nothing_is_lost(source: Path, small: Index, tmp_path: Path) -> None:
    def kill_one(done: int, total: int) -> None:
        if done and done < total:
            children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
            workers = [pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
            os.kill(int(workers[0]), signal.SIGKILL)

    with pytest.raises(OrchestratorError, match="one of 2 processes was killed, most likely for want of memory"):
        pack(source, tmp_path / "out", shard_bytes=1500, jobs=2, progress=kill_one)
    pack(source, tmp_path / "out", shard_bytes=6000)
    assert files_of(tmp_path / "out") == files_of(small.folder)


def test_ctrl_c_says_how_to_go_on(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: object, done: int, total: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command.Ticker, "__call__", interrupt)
    with pytest.raises(Interrupted, match="was interrupted; the same command goes on from here") as caught:
        command.pack(str(source), tmp_path / "out", jobs=1)
    assert caught.value.exit_code == 75


def test_larger_images_are_made_smaller_and_small_ones_keep_their_bytes(tmp_path: Path) -> None:
    rotated = Image.Exif()
    rotated[0x0112] = 6
    files = {
        "a/small.jpg": encoded(noise(0, 30, 20), "JPEG"),
        "a/wide.jpg": encoded(noise(1, 80, 40), "JPEG"),
        "a/cmyk.jpg": encoded(noise(2, 40, 80), "JPEG", mode="CMYK"),
        "b/gray.jpg": encoded(noise(3, 64, 64, channels=1), "JPEG"),
        "b/turned.jpg": encoded(noise(4, 80, 40), "JPEG", exif=rotated),
        "b/palette.png": encoded(noise(5, 50, 100), mode="P"),
        "b/deep.png": encoded(noise(6, 64, 32, channels=1).astype(np.uint16) * 256),
    }
    source = write_tar(tmp_path / "x.tar", list(files.items()))
    index = pack(source, tmp_path / "out", encoding=Encoding(max_side=32))
    images = [ShardReader(index).read(i) for i in range(index.num_samples)]
    sizes = sorted((Image.open(io.BytesIO(data)).size, suffix) for _, suffix, data in images)
    jpegs = [((30, 20), "jpg"), ((32, 16), "jpg"), ((16, 32), "jpg"), ((32, 32), "jpg"), ((16, 32), "jpg")]
    assert sizes == sorted([*jpegs, ((16, 32), "png"), ((32, 16), "png")])
    assert files["a/small.jpg"] in [data for _, _, data in images]
    modes = {Image.open(io.BytesIO(data)).mode for _, _, data in images}
    assert modes == {"L", "RGB", "RGBA"}
    assert pack(source, tmp_path / "again", encoding=Encoding(max_side=32)).sha256 == index.sha256


def test_a_smaller_image_is_what_pillow_makes_of_it(tmp_path: Path) -> None:
    data = encoded(noise(1, 80, 40), "PNG")
    index = pack(write_tar(tmp_path / "x.tar", [("a/1.png", data)]), tmp_path / "out", encoding=Encoding(max_side=20))
    found = Image.open(io.BytesIO(ShardReader(index).read(0)[2]))
    expected = Image.open(io.BytesIO(data)).resize((20, 10), Image.Resampling.LANCZOS)
    assert np.array_equal(np.asarray(found), np.asarray(expected))


def test_quality_encodes_every_jpeg_anew_and_leaves_png(tmp_path: Path) -> None:
    jpeg, png = encoded(noise(1, 64, 64), "JPEG", quality=95), encoded(noise(2))
    source = write_tar(tmp_path / "x.tar", [("a/1.jpg", jpeg), ("a/2.png", png)])
    index = pack(source, tmp_path / "out", encoding=Encoding(quality=20))
    found = {suffix: data for _, suffix, data in (ShardReader(index).read(i) for i in range(2))}
    assert found["png"] == png
    assert len(found["jpg"]) < len(jpeg) / 2


def test_an_image_that_cannot_be_made_smaller_is_named(tmp_path: Path) -> None:
    cut = encoded(noise(0, 64, 64), "JPEG")[:200]
    source = write_tar(tmp_path / "x.tar", [("a/cut.jpg", cut)])
    with pytest.raises(DataError, match=r"x\.tar: a/cut\.jpg: "):
        pack(source, tmp_path / "out", encoding=Encoding(max_side=10))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--jobs", "0"), "--jobs: must be a whole number >= 1, got '0'"),
        (("--shard-size", "1.5"), "--shard-size: must be a whole number >= 1, got '1.5'"),
        (("--max-side", "-3"), "--max-side: must be a whole number >= 1, got '-3'"),
        (("--quality", "101"), "--quality: must be a whole number from 1 to 100, got '101'"),
    ],
)
def test_a_wrong_option_is_exit_2(tmp_path: Path, in_process: Command, option: tuple[str, str], message: str) -> None:
    result = in_process("data", "pack", "digits", tmp_path / "out", f"{option[0]}={option[1]}")
    assert result.returncode == 2
    assert message in result.stderr


def test_the_command_tells_speed_and_time_left(tmp_path: Path, in_process: Command) -> None:
    result = in_process("data", "pack", "digits", tmp_path / "out", "--jobs", "1")
    assert re.search(r"read 1797 of 1797 images, \d+ images/s", result.stderr)
    assert re.search(r"1797 images, 10 classes, 1 shard, .* MB; 1797 read in [\d.]+ s, \d+ images/s;", result.stdout)


def test_processes_are_started_where_they_are_worth_it() -> None:
    assert worth(100 * 2**20, heavy=False) == 1
    assert worth(100 * 2**30, heavy=False) == cores()
    assert worth(100 * 2**20, heavy=True) == 1
    assert worth(1000 * 2**20, heavy=True) == min(cores(), 15)


def test_a_disk_that_fills_up_while_unpacking_costs_no_finished_shard(
    images: Files, small: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tmp_path / "small.tar.gz", tmp_path / "out"
    source.write_bytes(gzip.compress(tar_bytes(images)))

    def stop(done: int, total: int) -> None:
        if done == 8:
            raise _Killed

    with pytest.raises(_Killed):
        pack(source, out, shard_bytes=6000, progress=stop)
    finished = files_of(tmp_path / ".out.packing" / "shards")

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copyfileobj", full)
        with pytest.raises(OrchestratorError, match="No space left") as caught:
            pack(source, out, shard_bytes=6000)
    assert caught.value.exit_code == 1, "the source is not at fault"
    assert finished and files_of(tmp_path / ".out.packing" / "shards") == finished
    pack(source, out, shard_bytes=6000)
    assert {path.name: path.read_bytes() for path in out.glob("*.tar")} == {
        path.name: path.read_bytes() for path in small.folder.glob("*.tar")
    }


@pytest.mark.parametrize("place", [".", ".."])
def test_a_place_without_a_name_is_refused(
    source: Path, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty" / "er").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "empty" / "er")
    with pytest.raises(JobError, match=f"{place}: must be a folder with a name of its own"):
        pack(source, Path(place))
