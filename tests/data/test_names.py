"""What samples were called before they were packed."""

from __future__ import annotations

from pathlib import Path

from orchestrator.data.index import Index
from orchestrator.data.names import FILE, source_names
from orchestrator.data.packing.pack import pack
from orchestrator.data.reader import ShardReader
from orchestrator.data.verify import problems
from tests.data.conftest import PNG_END, encoded, noise


def packed_folder(tmp_path: Path) -> Index:
    for label in "ab":
        for i in range(12):
            file = tmp_path / "source" / label / "deep er" / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(encoded(noise(10 * i + ord(label))))
    (tmp_path / "source" / "a" / "page.png").write_bytes(b"<html>")
    (tmp_path / "source" / "b" / "odd\nname.png").write_bytes(encoded(noise(7))[:60] + PNG_END)
    return pack(tmp_path / "source", tmp_path / "out", shard_bytes=6000, skip_bad=True)


def test_the_name_of_a_sample_is_the_path_of_its_file_in_the_source(tmp_path: Path) -> None:
    index = packed_folder(tmp_path)
    reader = ShardReader(index)
    samples = {key: reader.read(i)[2] for i in range(index.num_samples) for key in index.keys([i])}
    names = source_names(index, samples)
    assert len(set(names.values())) == len(samples) == 25
    for key, name in names.items():
        assert (tmp_path / "source" / name.replace("odd name", "odd\nname")).read_bytes() == samples[key]


def test_verify_says_the_name_of_a_damaged_image(tmp_path: Path) -> None:
    (problem,) = problems(packed_folder(tmp_path), decode=True)
    assert problem.text.endswith(" (packed from b/odd name.png)")


def test_without_the_list_there_are_keys_alone(tmp_path: Path) -> None:
    index = packed_folder(tmp_path)
    identity = index.sha256
    (index.folder / FILE).unlink()
    assert source_names(index, index.keys([0, 1])) == {}
    (problem,) = problems(index, decode=True)
    assert "packed from" not in problem.text
    assert index.sha256 == identity
