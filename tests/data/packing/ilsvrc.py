"""ImageNet's files as they are downloaded, in small: a tar of class tars, a flat validation tar, the devkit."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy.io import savemat

from tests.data.conftest import Files, tar_bytes, write_tar

GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"


def train_tar(path: Path, classes: Mapping[str, Files]) -> Path:
    """A tar that holds n01440764.tar and so on, each with the images of one class."""
    return write_tar(path, [(f"{wnid}.tar", tar_bytes(files)) for wnid, files in classes.items()])


def val_tar(path: Path, images: Sequence[bytes]) -> Path:
    """ILSVRC2012_val_00000001.JPEG and so on, beside one another."""
    return write_tar(path, [(f"ILSVRC2012_val_{i:08d}.JPEG", image) for i, image in enumerate(images, start=1)])


def meta_mat(synsets: Sequence[tuple[int, str, str, int]]) -> bytes:
    """The devkit's meta.mat: a struct array of (number, WordNet id, words, number of children) among other fields."""
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    rows = [(number, wnid, words, f"what {words} is", children) for number, wnid, words, children in synsets]
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": np.array(rows, dtype=kinds).reshape(-1, 1)})
    return buffer.getvalue()


def devkit(path: Path, synsets: Sequence[tuple[int, str, str, int]], numbers: Sequence[int]) -> Path:
    """ILSVRC2012_devkit_t12.tar.gz with the two files that matter and one that does not."""
    top = "ILSVRC2012_devkit_t12"
    truth = "".join(f"{number}\n" for number in numbers).encode()
    files = [("readme.txt", b"hello"), ("data/meta.mat", meta_mat(synsets)), (f"data/{GROUND_TRUTH}", truth)]
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files:
            member = tarfile.TarInfo(f"{top}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path
