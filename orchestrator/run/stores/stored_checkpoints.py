"""Checkpoints in a store: the manifest goes up last and away first, and nothing is loaded that was not hashed here."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from orchestrator.data.stores.run_store import RunStore, Stored
from orchestrator.errors import CheckpointError, OrchestratorError
from orchestrator.run import checkpoint
from orchestrator.run.folder import RunFolder
from orchestrator.run.stores.lease import holder_of

_FILE = re.compile(r"(step_(\d{9}))/([^/]+)")
_MANIFEST = "manifest.json"


class StoredCheckpoints:
    """The checkpoints of the run `name` in a store, and the way of each from and to its folder on this machine.

    Raises what RunStore raises, OSError for the disk here.
    """

    def __init__(self, store: RunStore, name: str, folder: RunFolder) -> None:
        self._store, self._name, self._folder = store, name, folder
        self.place = f"{store.url}/{name}/checkpoints"

    def files(self) -> dict[int, dict[str, Stored]]:
        """What is there of every step, in order of steps, finished or not."""
        found: defaultdict[int, dict[str, Stored]] = defaultdict(dict)
        for name, stored in self._store.listed(f"{self._name}/checkpoints").items():
            match = _FILE.fullmatch(name)
            if match:
                found[int(match[2])][match[3]] = stored
        return dict(sorted(found.items()))

    def steps(self) -> list[int]:
        """Steps whose upload was finished, oldest first."""
        return [step for step, files in self.files().items() if _MANIFEST in files]

    def send(self, where: Path, step: int, names: Iterable[str]) -> int:
        """Upload these files of the folder `where`; returns their bytes."""
        size = 0
        for name in names:
            self._store.put(self._key(step, name), where / name)
            size += (where / name).stat().st_size
        return size

    def finish(self, step: int, fence: str) -> None:
        """Make an upload count, when all files but state and manifest are there.

        Raises OrchestratorError when the lease of the run is no longer the one of `fence`.
        """
        where = checkpoint.step_folder(self._folder, step)
        self.send(where, step, ["state.json"])
        if holder_of(self._store, self._name) != fence:
            raise Fenced(
                f"{self._name}: another driver has taken over this run ({self._store.url}); this one writes no more"
            )
        self.send(where, step, [_MANIFEST])

    def send_whole(self, step: int, fence: str) -> None:
        """Upload a checkpoint that is whole here."""
        where = checkpoint.step_folder(self._folder, step)
        entries = checkpoint.manifest_entries((where / _MANIFEST).read_bytes())
        self.send(where, step, [entry.name for entry in entries if entry.name != "state.json"])
        self.finish(step, fence)

    def prune(self, keep_last: int, saved: int) -> None:
        """As `checkpoint.prune`; also delete what torn uploads left before the newest that is kept."""
        files = self.files()
        kept = [step for step in files if _MANIFEST in files[step] and step <= saved][-keep_last:]
        self.delete(step for step in files if kept and step not in kept and step < kept[-1])

    def delete(self, steps: Iterable[int]) -> None:
        """Delete checkpoints, each with its manifest first, so that half of one is never taken for one."""
        files = self.files()
        for step in steps:
            rest = [self._key(step, name) for name in files.get(step, {}) if name != _MANIFEST]
            self._store.delete([self._key(step, _MANIFEST)])
            self._store.delete(rest)

    def bring(self, step: int) -> list[str]:
        """Make the folder of a step here what the store has; what is wrong with it, nothing when it is whole."""
        return self._bring(step, self.files().get(step, {}), checkpoint.step_folder(self._folder, step))

    def _bring(self, step: int, files: dict[str, Stored], where: Path) -> list[str]:
        try:
            manifest = self._manifest(step)
            entries = checkpoint.manifest_entries(manifest)
        except ValueError as error:
            return [str(error)]
        if (where / _MANIFEST).exists() and (where / _MANIFEST).read_bytes() == manifest:
            if not checkpoint.problems(where):
                return []
        else:
            shutil.rmtree(where, ignore_errors=True)
        where.mkdir(parents=True, exist_ok=True)
        wrong = _unlike(entries, files)
        if wrong:
            return wrong
        for entry in entries:
            if checkpoint.fault(where, entry) is not None:
                self._store.fetch(self._key(step, entry.name), where / entry.name, entry.bytes)
        (where / _MANIFEST).write_bytes(manifest)
        return checkpoint.problems(where)

    def bring_newest(self, *, ours: bool, fence: str | None = None) -> list[str]:
        """Have the newest whole checkpoint of store and disk here; a warning for each newer one that is not whole.

        Where what is here is `ours`, one that the store lacks counts too, and goes up for the driver that gives its
        `fence`; else it is removed: the run went on elsewhere. Raises CheckpointError when there are checkpoints and
        all are damaged.
        """
        warnings: list[str] = []
        files = self.files()
        stored = {step for step in files if _MANIFEST in files[step]}
        for step in sorted(stored | set(checkpoint.steps_found(self._folder)), reverse=True):
            where = checkpoint.step_folder(self._folder, step)
            if step in stored:
                wrong = self._bring(step, files[step], where)
                if not wrong:
                    return warnings
                warnings.append(f"{self.place}/{where.name}: {'; '.join(wrong)}; going back to the one before")
                shutil.rmtree(where, ignore_errors=True)
            elif not ours:
                shutil.rmtree(where)
            elif not checkpoint.problems(where):
                if fence is not None:
                    self.send_whole(step, fence)
                return warnings
        if stored:
            raise CheckpointError(
                f"{self.place}: no checkpoint is whole:\n  "
                + "\n  ".join(warnings)
                + "\nUse --resume never to start afresh (this run is renamed, not deleted)."
            )
        return warnings

    def problems(self, step: int, *, hashes: bool) -> list[str]:
        """What is wrong with a checkpoint in the store: with its sizes, or with every byte."""
        files = self.files().get(step, {})
        if hashes:
            with tempfile.TemporaryDirectory(prefix="hff-orchestrator-") as folder:
                return self._bring(step, files, Path(folder) / "checkpoint")
        try:
            return _unlike(checkpoint.manifest_entries(self._manifest(step)), files)
        except ValueError as error:
            return [str(error)]

    def _manifest(self, step: int) -> bytes:
        found = self._store.get(self._key(step, _MANIFEST))
        if found is None:
            raise ValueError(f"{_MANIFEST} is missing")
        return found[0]

    def _key(self, step: int, name: str) -> str:
        return f"{self._name}/checkpoints/{checkpoint.step_folder(self._folder, step).name}/{name}"


def _unlike(entries: Iterable[checkpoint.FileEntry], files: Mapping[str, Stored]) -> list[str]:
    """Which files of a manifest are not there in their size."""
    wrong = []
    for entry in entries:
        stored = files.get(entry.name)
        if stored is None:
            wrong.append(f"{entry.name} is missing")
        elif stored.bytes != entry.bytes:
            wrong.append(f"{entry.name} has {stored.bytes} bytes, expected {entry.bytes}")
    return wrong


class Fenced(OrchestratorError):
    """Another driver has the run: whatever this one still holds is not written."""
