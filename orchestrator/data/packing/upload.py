"""Packing into a store: shards are made in a folder of this machine, then brought up, the index last."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

from orchestrator.data.index import open_index
from orchestrator.data.stores.cache import default_folder
from orchestrator.data.stores.remote_index import open_data
from orchestrator.data.stores.run_store import RunStore
from orchestrator.errors import JobError
from orchestrator.job import paths

_INDEX = "index.json"
# Holds, until the upload is whole, the identity of the set that it is of.
_BEGUN = ".uploading"


def pack_into_store(
    source: str, url: str, pack: Callable[[Path], int], progress: Callable[[int, int], None], say: Callable[[str], None]
) -> int:
    """Let `pack` fill a folder here, upload it to `url` and remove it; returns what `pack` did.

    Without its index, which goes up last, nobody takes the rest for a packed set; what an upload of the same set has
    brought there already is not sent again. Raises JobError for a URL that is none or where other data lie,
    and what RunStore raises.
    """
    fault = paths.location_fault(url)
    if fault:
        raise JobError(f"{paths.redacted(url)}: {fault}")
    store = RunStore(url)
    if store.get(_INDEX) is not None:
        found = open_data(url).source
        if found != Path(source).name:
            raise JobError(
                f"{url}: holds data packed from {found!r} already, not from {source!r}; choose another place"
            )
        say(f"{url} holds packed data already. Delete it there to pack it afresh.")
        return 0
    here = default_folder().parent / "packed" / hashlib.sha256(url.encode()).hexdigest()[:16]
    here.parent.mkdir(parents=True, exist_ok=True)
    done = pack(here)
    identity, begun = open_index(here).sha256.encode(), store.get(_BEGUN)
    there = {}
    if begun is not None and begun[0] == identity:
        there = store.listed("")
    else:  # what lies there may have the names and sizes of ours, but other labels
        store.put(_BEGUN, identity)
    files = sorted(here.iterdir(), key=lambda path: (path.name == _INDEX, path.name))
    for number, path in enumerate(files):
        progress(number, len(files))
        stored = there.get(path.name)
        if stored is None or stored.bytes != path.stat().st_size:
            store.put(path.name, path)
    store.delete([_BEGUN])
    progress(len(files), len(files))
    shutil.rmtree(here)
    say(f"{url}: uploaded; orchestrator data verify {url} proves it")
    return done
