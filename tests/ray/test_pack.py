"""Shards that Ray's workers write are those of this process."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.data.packing.pack import pack
from tests.conftest import Command
from tests.data.conftest import encoded, noise, write_tar

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]


def test_packing_on_ray_gives_the_bytes_of_packing_here_and_tells_a_bad_image_alike(
    orchestrator: Command, tmp_path: Path
) -> None:
    images = [(f"{label}/{i}.png", encoded(noise(i, 60, 60))) for label in "abc" for i in range(40)]
    source = write_tar(tmp_path / "images.tar", images)
    here = pack(source, tmp_path / "here", shard_bytes=2**20)
    # Relative paths: the workers have another working folder.
    done = orchestrator("data", "pack", "images.tar", "there", "--shard-size", "1", "--ray", cwd=tmp_path, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Ray on 1 node, " in done.stdout
    assert len(here.shards) > 1
    names = sorted(path.name for path in here.folder.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "there").iterdir())
    for name in names:
        assert (here.folder / name).read_bytes() == (tmp_path / "there" / name).read_bytes(), name
    write_tar(tmp_path / "bad.tar", [*images, ("a/bad.png", b"<html>")])
    done = orchestrator("data", "pack", "bad.tar", "bad", "--shard-size", "1", "--ray", cwd=tmp_path, timeout=200)
    assert done.returncode == 3, done.stdout + done.stderr
    assert "bad.tar: a/bad.png: neither JPEG nor PNG by its first bytes\n" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "bad").exists()
