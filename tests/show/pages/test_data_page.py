"""`data stats`: what is counted is what was packed, in words and on a page that needs nothing else."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from orchestrator.data.describe import describe, thumbnails
from orchestrator.data.index import Index
from orchestrator.data.packing.labels import Labelling
from orchestrator.data.packing.pack import pack
from tests.conftest import Command
from tests.data.conftest import PNG_END, encoded, noise, without_tables, write_tar


@pytest.fixture
def mixed(tmp_path: Path) -> Index:
    """6 and 2 images; JPEG in two modes, PNG in three; a PNG cut after its header, a JPEG damaged within."""
    files = [
        ("n01/0.jpg", encoded(noise(0, 40, 30), "JPEG")),
        ("n01/1.jpg", encoded(noise(1, 20, 50), "JPEG", mode="CMYK")),
        ("n01/2.png", encoded(noise(2, 10, 10))),
        ("n01/3.png", encoded(noise(3, 10, 10, channels=1))),
        ("n01/4.png", encoded(noise(4, 10, 10), mode="P")),
        ("n01/5.jpg", without_tables(encoded(noise(5, 40, 30), "JPEG"))),
        ("n02/6.png", encoded(noise(6, 60, 10))[:20] + PNG_END),
        ("n02/7.jpg", encoded(np.full((24, 32, 3), (255, 0, 0), np.uint8), "JPEG")),
    ]
    (tmp_path / "names").write_text("n01 <b>tench</b>\nn02 hen\n")
    labelling = Labelling(class_names=tmp_path / "names")
    return pack(write_tar(tmp_path / "x.tar", files), tmp_path / "mixed", labelling=labelling)


def test_counts_sizes_and_modes_are_those_of_the_images(mixed: Index) -> None:
    found = describe(mixed)
    assert found.per_class == {"n01": 6, "n02": 2}
    assert found.imbalance == 3
    assert found.suffixes == {"jpg": 4, "png": 4}
    assert found.modes == {"RGB": 4, "CMYK": 1, "L": 1, "P": 1}
    assert sorted(zip(found.widths, found.heights, strict=True)) == sorted(
        [(40, 30), (20, 50), (10, 10), (10, 10), (10, 10), (40, 30), (32, 24)]
    )
    assert (found.bad, found.looked_at) == (1, 8)
    assert found.bytes[0] == 32


def test_of_a_large_set_some_images_are_looked_at(mixed: Index) -> None:
    found = describe(mixed, looked_at=3)
    assert (found.samples, found.looked_at, sum(found.modes.values()) + found.bad) == (8, 3, 3)


def test_the_contact_sheet_shows_every_class_before_any_twice(mixed: Index) -> None:
    assert [label for label, _ in thumbnails(mixed, 2) if label == "hen"] or len(thumbnails(mixed, 2)) == 1
    shown = thumbnails(mixed, 8)
    assert [label for label, _ in shown] == ["<b>tench</b>"] * 5 + ["hen"]
    red = np.asarray(Image.open(io.BytesIO(shown[-1][1]))).reshape(-1, 3).mean(axis=0)
    assert red[0] > 245 and red[1] < 10 and red[2] < 10


def test_the_page_is_whole_and_says_what_the_command_says(mixed: Index, tmp_path: Path, in_process: Command) -> None:
    done = in_process("data", "stats", mixed.folder, "--html", tmp_path / "page.html")
    assert done.returncode == 0, done.stderr
    for words in ("8 images, 2 classes", "4 RGB, 1 CMYK, 1 L, 1 P (of all)", "2 to 6 images (3.00 : 1)", "hen"):
        assert words in done.stdout
    page = (tmp_path / "page.html").read_text()
    assert mixed.sha256 in page
    assert "<b>tench</b>" not in page, "names are text"
    pictures = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    assert len(pictures) == 6
    assert Image.open(io.BytesIO(base64.b64decode(pictures[0]))).size == (96, 96)
    assert not re.search(r'(?:src|href)="(?!data:)', page), "nothing is loaded from anywhere"
