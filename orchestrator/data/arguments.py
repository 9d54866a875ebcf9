"""The words of `orchestrator data ...`. What they need is imported when they are called."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.errors import JobError
from orchestrator.job import paths
from orchestrator.storage import result_file

if TYPE_CHECKING:
    from orchestrator.data.packing.pack import Share


def add_to(actions: Any) -> None:
    """Add the actions to the subparsers of `orchestrator data`."""
    pack = actions.add_parser(
        "pack",
        help="images -> shards and index",
        description="Goes on where it was killed. The bytes depend on the images and the options, not on --jobs.",
    )
    pack.add_argument(
        "source",
        metavar="SOURCE",
        help="folder or tar(.gz) of CLASS/IMAGE, tar or folder of class tars (ILSVRC2012_img_train.tar), unsorted "
        "images with --labels (ILSVRC2012_img_val.tar), or `digits`",
    )
    pack.add_argument("out", metavar="OUT", help="folder, or s3:// or gs:// URL, for *.tar and index.json")
    pack.add_argument(
        "--labels",
        metavar="FILE",
        type=Path,
        help="classes of unsorted images in the order of their names: WordNet ids or numbers, one a line, or the "
        "ILSVRC2012 devkit (tar.gz or folder)",
    )
    pack.add_argument(
        "--synsets", metavar="FILE", type=Path, help="what numbers mean: meta.mat, or lines `WNID NUMBER [WORDS]`"
    )
    _add_classes(pack)
    pack.add_argument("--shard-size", metavar="MIB", default="256", help="a shard before --max-side (default 256)")
    pack.add_argument("--max-side", metavar="PIXELS", help="make larger images smaller")
    pack.add_argument("--quality", metavar="1..100", help="encode every JPEG anew (default of --max-side: 90)")
    pack.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave out images that cannot be packed, at most one in ten; index.json and `stats` name them",
    )
    pack.add_argument(
        "--ray",
        action="store_true",
        help="write the shards on the Ray cluster at RAY_ADDRESS, whose nodes see SOURCE and OUT under these paths",
    )
    index = actions.add_parser("index", help="an index for WebDataset shards that are there; they stay as they are")
    index.add_argument("folder", metavar="FOLDER", type=Path, help="folder of *.tar with .jpg, .jpeg or .png and .cls")
    _add_classes(index)
    verify = actions.add_parser("verify", help="check every hash, count and label")
    verify.add_argument("--decode", action="store_true", help="decode every image too")
    verify.add_argument(
        "--fix",
        action="store_true",
        help="name bad samples in quarantine.json: training leaves them out",
    )
    _add_jobs(verify)
    stats = actions.add_parser("stats", help="classes, sizes, modes, bytes, balance")
    stats.add_argument("--html", metavar="FILE", type=result_file, help="also one page with some of the images")
    for action in (verify, stats):
        action.add_argument("out", metavar="OUT", help="a folder or URL with index.json")


def _add_classes(action: argparse.ArgumentParser) -> None:
    action.add_argument("--classes", metavar="INDEX", type=Path, help="a packed set whose class list this one gets")
    action.add_argument("--class-names", metavar="FILE", type=Path, help="readable names, lines `CLASS NAME`")
    _add_jobs(action)


def _add_jobs(action: argparse.ArgumentParser) -> None:
    action.add_argument("--jobs", metavar="N", help="processes (default: as many cores as are worth it)")


def call(arguments: argparse.Namespace, share: Share | None = None) -> int:
    """Carry out the action; returns the exit code. With `share` shards are written elsewhere."""
    from orchestrator.data import command
    from orchestrator.data.packing.labels import Labelling

    if arguments.action == "pack":
        return _pack(arguments, share)
    if arguments.action == "index":
        labelling = Labelling(classes=arguments.classes, class_names=arguments.class_names)
        return command.index(arguments.folder, labelling=labelling, jobs=_number(arguments.jobs, "--jobs"))
    if arguments.action == "verify":
        jobs = _number(arguments.jobs, "--jobs")
        return command.verify(arguments.out, decode=arguments.decode, fix=arguments.fix, jobs=jobs)
    return command.stats(arguments.out)


def _pack(arguments: argparse.Namespace, share: Share | None) -> int:
    from orchestrator.data import command
    from orchestrator.data.packing.labels import Labelling
    from orchestrator.data.packing.reencode import Encoding

    source, out = arguments.source, arguments.out
    if share is not None:  # other processes may have another working folder
        if paths.is_store(out):
            raise JobError("--ray: OUT must be a folder that every node sees; pack into one, then upload it")
        source, out = source if source == "digits" else str(Path(source).absolute()), str(Path(out).absolute())
    return command.pack_anywhere(
        source,
        out,
        labelling=Labelling(arguments.labels, arguments.synsets, arguments.classes, arguments.class_names),
        encoding=Encoding(_number(arguments.max_side, "--max-side"), _number(arguments.quality, "--quality", most=100)),
        shard_bytes=(_number(arguments.shard_size, "--shard-size") or 0) * 2**20,
        jobs=_number(arguments.jobs, "--jobs"),
        skip_bad=arguments.skip_bad,
        share=share,
    )


def _number(text: str | None, flag: str, most: int | None = None) -> int | None:
    if text is None:
        return None
    if not text.isdecimal() or int(text) < 1 or (most is not None and int(text) > most):
        limits = ">= 1" if most is None else f"from 1 to {most}"
        raise JobError(f"{flag}: must be a whole number {limits}, got {text!r}")
    return int(text)
