"""Packing into a bucket: nothing is taken for a packed set before all of it is there, and it is what a folder holds."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.conftest import Command
from tests.data.conftest import Files, write_tar
from tests.stores import BUCKET, Bucket, Door, Fault


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_an_upload_that_was_refused_goes_on_and_the_index_goes_up_last(
    images: Files, bucket: Bucket, before: Door, in_process: Command, tmp_path: Path
) -> None:
    source, prefix = write_tar(tmp_path / "small.tar", images), f"{tmp_path.name}/packed"
    url = f"s3://{BUCKET}/{prefix}"
    before.faults[:] = [
        Fault(503, where="members", method="PUT", times=2),
        Fault(403, where="shard-000000", method="PUT"),
    ]
    done = in_process("data", "pack", source, url)
    assert done.returncode == 2
    assert "reading and writing is not allowed (403); set AWS_ACCESS_KEY_ID" in done.stderr
    assert "index.json" not in bucket.names(prefix)
    sent_before = bucket.names(prefix)
    before.written.clear()
    done = in_process("data", "pack", source, url)
    assert done.returncode == 0, done.stderr
    written = [path.rpartition("/")[2] for method, path in before.written if method == "PUT"]
    assert written[-1] == "index.json" and not set(written) & set(sent_before)
    assert before.fired == {503: 2, 403: 1}
    here = in_process("data", "pack", source, tmp_path / "here")
    assert here.returncode == 0, here.stderr
    files = {path.name: path.read_bytes() for path in (tmp_path / "here").iterdir()}
    assert {name: bucket.get(f"{prefix}/{name}") for name in bucket.names(prefix)} == files
    assert not list((tmp_path / "cache" / "hff-orchestrator" / "packed").iterdir()), "nothing is left here"
    assert in_process("data", "verify", url).returncode == 0
    assert "holds packed data already" in in_process("data", "pack", source, url).stdout
    other = write_tar(tmp_path / "other.tar", images)
    done = in_process("data", "pack", other, url)
    assert done.returncode == 2 and "holds data packed from 'small.tar' already" in done.stderr


def test_an_upload_of_other_labels_sends_every_shard_again(
    images: Files, bucket: Bucket, before: Door, in_process: Command, tmp_path: Path
) -> None:
    source, url = write_tar(tmp_path / "small.tar", images), f"s3://{BUCKET}/{tmp_path.name}/packed"
    before.faults[:] = [Fault(403, where="index.json", method="PUT")]
    assert in_process("data", "pack", source, url).returncode == 2
    shutil.rmtree(tmp_path / "cache")
    swapped = {"a": "b", "b": "a"}
    write_tar(source, [(swapped[name[0]] + name[1:], content) for name, content in images])
    done = in_process("data", "pack", source, url)
    assert done.returncode == 0, done.stderr
    done = in_process("data", "verify", url)
    assert done.returncode == 0, done.stderr


def test_a_place_with_a_password_is_refused(in_process: Command) -> None:
    done = in_process("data", "pack", "x.tar", "s3://me:word@bucket/x")
    assert done.returncode == 2
    assert "must hold no user or password" in done.stderr and "word@" not in done.stderr
