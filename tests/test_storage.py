"""Files that are whole or not there: also on a full disk, and at a place that a command is given."""

from __future__ import annotations

import argparse
import errno
import os
from pathlib import Path

import pytest

from orchestrator.storage import result_file, write_atomically


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "progress.json"
    write_atomically(path, "old")

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new")
    assert [file.name for file in tmp_path.iterdir()] == ["progress.json"]
    assert path.read_text() == "old"


def test_a_place_where_no_file_can_be_written_is_refused(tmp_path: Path) -> None:
    assert result_file(str(tmp_path / "out.json")) == tmp_path / "out.json"
    for place in (tmp_path, tmp_path / "no" / "out.json"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"must be a file in a folder .*, got {place}"):
            result_file(str(place))
