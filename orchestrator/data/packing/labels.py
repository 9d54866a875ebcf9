"""Class lists beside the images: ground truth of unsorted images, the ILSVRC devkit, readable names, other indexes."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.data.index import open_index
from orchestrator.errors import DataError

_GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
_SYNSETS = "meta.mat"


@dataclass(frozen=True)
class Labelling:
    """Where classes come from, when not from the folders alone. All of it is optional.

    `labels`: one class per image in the order of their names, as WordNet ids or as the devkit's numbers, or the
    devkit itself (folder or tar.gz). `synsets`: what the numbers mean. `classes`: a packed set whose class list
    this one gets. `class_names`: readable names.
    """

    labels: Path | None = None
    synsets: Path | None = None
    classes: Path | None = None
    class_names: Path | None = None


@dataclass(frozen=True)
class Labels:
    """What the files of a `Labelling` say: a class per image, the whole class list, readable names by class."""

    per_image: list[str] | None = None
    classes: tuple[str, ...] | None = None
    names: Mapping[str, str] = field(default_factory=dict)


def read_labels(files: Labelling) -> Labels:
    """Read what is given. Raises DataError naming file and line."""
    if files.synsets is not None and files.labels is None:
        raise DataError(f"{files.synsets}: --synsets explains the numbers of --labels FILE, which is not given")
    names: dict[str, str] = {}
    classes = per_image = None
    if files.classes is not None:
        index = open_index(files.classes)
        classes = index.classes
        names |= index.class_names
    if files.labels is not None:
        per_image, found = _per_image(files.labels, files.synsets)
        names = found | names
    if files.class_names is not None:
        names |= _class_names(files.class_names)
    return Labels(per_image, classes, names)


def class_list(found: Iterable[str], labels: Labels, source: str, files: Labelling) -> tuple[str, ...]:
    """The classes of a set: the sorted ones that it has, or those of the other set, which must hold them all."""
    present = sorted(set(found))
    if labels.classes is None:
        classes = tuple(present)
    else:
        classes = labels.classes
        unknown = sorted(set(present) - set(classes))
        if unknown:
            raise DataError(
                f"{files.labels or source}: {len(unknown)} classes are not among the {len(classes)} of "
                f"{files.classes}: {some(unknown)}"
            )
    unnamed = [label for label in classes if label not in labels.names]
    if files.class_names is not None and unnamed:
        raise DataError(f"{files.class_names}: has no name for {len(unnamed)} of the classes: {some(unnamed)}")
    return classes


def some(names: Sequence[str], most: int = 5) -> str:
    """The first of some names, in words."""
    return ", ".join(names[:most]) + (" ..." if len(names) > most else "")


def _lines(path: Path, data: bytes | None = None) -> list[str]:
    try:
        text = (path.read_bytes() if data is None else data).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as text: {error}") from None
    lines = [line.strip() for line in text.rstrip().splitlines()]
    if not lines:
        raise DataError(f"{path}: is empty")
    return lines


def _per_image(path: Path, synsets: Path | None) -> tuple[list[str], dict[str, str]]:
    """One class per image, and the readable names that came along."""
    devkit = _devkit(path)
    lines = _lines(path / _GROUND_TRUTH, devkit[0]) if devkit else _lines(path)
    for number, line in enumerate(lines, start=1):
        if len(line.split()) != 1:
            raise DataError(f"{path}:{number}: expected one WordNet id or number, got {line[:40]!r}")
    if not any(line.isdecimal() for line in lines):
        if synsets is not None:
            raise DataError(f"{synsets}: --synsets explains numbers, but {path} has ids ({lines[0]} ...)")
        return lines, {}
    if devkit is not None:
        meaning = _meta(path / _SYNSETS, devkit[1])
    elif synsets is not None:
        meaning = _meta(synsets) if synsets.suffix == ".mat" else _numbered(synsets)
    else:
        raise DataError(
            f"{path}: states numbers ({lines[0]} ...): say what they mean with --synsets FILE (the devkit's meta.mat), "
            "or give the whole devkit as --labels"
        )
    for number, line in enumerate(lines, start=1):
        if line not in meaning:
            raise DataError(f"{path}:{number}: {line!r} is none of the {len(meaning)} numbers of the synset list")
    return [meaning[line][0] for line in lines], dict(meaning.values())


def _devkit(path: Path) -> tuple[bytes, bytes] | None:
    """(ground truth, meta.mat) of the ILSVRC2012 devkit as a folder or tar.gz; None for any other file."""
    wanted = (_GROUND_TRUTH, _SYNSETS)
    found: dict[str, bytes] = {}
    if path.is_dir():
        found = {name: file.read_bytes() for name in wanted for file in sorted(path.rglob(name))[:1]}
    else:
        try:
            if not tarfile.is_tarfile(path):
                return None
            with tarfile.open(path) as tar:
                for member in tar:
                    content = tar.extractfile(member) if Path(member.name).name in wanted else None
                    if content is not None:
                        found[Path(member.name).name] = content.read()
        except (OSError, EOFError, tarfile.TarError) as error:
            raise DataError(f"{path}: the list of labels cannot be read: {error}") from None
    for name in wanted:
        if name not in found:
            raise DataError(f"{path}: is no ILSVRC2012 devkit: {name} is missing")
    return found[_GROUND_TRUTH], found[_SYNSETS]


def _meta(path: Path, data: bytes | None = None) -> dict[str, tuple[str, str]]:
    """Number -> (WordNet id, words) of the devkit's meta.mat: its leaves; inner nodes of WordNet are no classes."""
    from scipy.io import loadmat

    try:
        synsets = loadmat(io.BytesIO(path.read_bytes() if data is None else data), squeeze_me=True)["synsets"]
        rows = [synsets[name].tolist() for name in ("ILSVRC2012_ID", "WNID", "words", "num_children")]
        leaves = (row[:3] for row in zip(*rows, strict=True) if int(row[3]) == 0)
        return {str(int(number)): (str(wnid), str(words)) for number, wnid, words in leaves}
    except Exception as error:  # scipy raises whatever its parser meets
        raise DataError(f"{path}: is not the devkit's meta.mat: {type(error).__name__}: {error}") from None


def _numbered(path: Path) -> dict[str, tuple[str, str]]:
    """Number -> (WordNet id, words) of a text with lines `WNID NUMBER [WORDS]`, as in map_clsloc.txt.

    A bare list of ids is refused: the devkit's numbers are not in the order of the ids, and a list in that order
    would give wrong labels without a sign.
    """
    meaning = {}
    for number, line in enumerate(_lines(path), start=1):
        wnid, which, *words = line.split(maxsplit=2) if line.count(" ") or line.count("\t") else (line, "")
        if not which.isdecimal():
            raise DataError(f"{path}:{number}: expected `WNID NUMBER [WORDS]`, got {line[:40]!r}; or give meta.mat")
        meaning[which] = (wnid, words[0].replace("_", " ") if words else wnid)
    return meaning


def _class_names(path: Path) -> dict[str, str]:
    """Class -> readable name of a text with lines `CLASS NAME`, as in LOC_synset_mapping.txt and words.txt."""
    names = {}
    for number, line in enumerate(_lines(path), start=1):
        label, *name = line.split(maxsplit=1)
        if not name:
            raise DataError(f"{path}:{number}: expected `CLASS NAME`, got {line[:40]!r}")
        names[label] = name[0]
    return names


def named(classes: Sequence[str], names: Mapping[str, str]) -> dict[str, Any]:
    """What an index states beside the classes: their readable names, where all of them have one."""
    return {"class_names": [names[label] for label in classes]} if all(label in names for label in classes) else {}
