"""What of a working directory goes to a cluster: code and job files, never data, secrets, git or environments."""

from __future__ import annotations

import fnmatch
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import JobError

# Names of files and folders at any depth, as shell patterns in lower case.
ENVIRONMENTS = (
    ".venv", "venv", ".tox", ".nox", ".conda", "node_modules", "__pycache__", "*.pyc", "*.egg-info",
    ".mypy_cache", ".ruff_cache", ".pytest_cache", ".ipynb_checkpoints",
)  # fmt: skip
VERSION_CONTROL = (".git", ".hg", ".svn")
SECRETS = (
    ".env", ".env.*", "*.pem", "*.key", "*.p12", "*.pfx", "*.jks", "id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*",
    ".netrc", "_netrc", ".npmrc", ".pypirc", ".pgpass", ".git-credentials", ".databrickscfg", ".aws", ".azure",
    ".gcloud", ".ssh", ".kube", ".docker", ".gnupg", "kubeconfig*", "credentials", "credentials.*", "secret",
    "secrets", "secret.*", "secrets.*", "*.secret", "service-account*.json", "token", "*.token",
)  # fmt: skip
DATA = ("*.tar", "*.tar.gz", "*.tgz", "*.zip", "*.db", "*.db-wal", "*.db-shm", "mlruns", "mlartifacts")
# These folders hold data and results, but a package of code may have the same name further down.
TOP_FOLDERS = ("data", "datasets", "runs", "outputs")

# What the head of a Ray cluster keeps of one working directory.
MOST_BYTES = 500 * 2**20
_NAMES = (*ENVIRONMENTS, *VERSION_CONTROL, *SECRETS, *DATA)


@dataclass(frozen=True)
class Package:
    """Files of `root` by relative path, sorted, and the bytes that they have together."""

    root: Path
    files: tuple[str, ...]
    bytes: int


def choose_files(root: Path, leave_out: Iterable[Path] = ()) -> Package:
    """The files of `root` that may travel: no secret, data, environment, nothing that git ignores, no link out of it.

    `leave_out` are more folders or files that stay here. Raises JobError when the rest is more than Ray takes.
    """
    root = root.resolve()
    out = [path.resolve() for path in leave_out]
    chosen = [
        name
        for name in sorted(_candidates(root))
        if not stays_here(name) and _inside(root, root / name) and not _below(root / name, out)
    ]
    size = sum((root / name).stat().st_size for name in chosen)
    if size > MOST_BYTES:
        largest = max(chosen, key=lambda name: (root / name).stat().st_size)
        raise JobError(
            f"{root}: has {size / 2**20:.0f} MiB of files to upload, at most {MOST_BYTES // 2**20} MiB are taken; "
            f"the largest is {largest}: move data to storage that the cluster sees, or name it in .gitignore"
        )
    return Package(root, tuple(chosen), size)


def stays_here(name: str) -> bool:
    """Whether a relative path has a part that never travels."""
    parts = name.lower().split("/")
    if len(parts) > 1 and parts[0] in TOP_FOLDERS:
        return True
    return any(fnmatch.fnmatchcase(part, pattern) for part in parts for pattern in _NAMES)


def copy_to(package: Package, folder: Path) -> None:
    """Copy the chosen files, with their modes, into the empty `folder`."""
    for name in package.files:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(package.root / name, target)


def _candidates(root: Path) -> Iterator[str]:
    """Regular files below `root`; in a git repository those that git does not ignore."""
    listed = _git_files(root)
    if listed is not None:
        yield from (name for name in listed if (root / name).is_file())
        return
    for folder, folders, files in os.walk(root):
        place = Path(folder).relative_to(root)
        folders[:] = [name for name in folders if not stays_here(str(place / name / "x"))]
        yield from (str(place / name) for name in files if (root / place / name).is_file())


def _git_files(root: Path) -> list[str] | None:
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None if done.returncode else [os.fsdecode(name) for name in done.stdout.split(b"\0") if name]


def _inside(root: Path, path: Path) -> bool:
    return path.resolve().is_relative_to(root)


def _below(path: Path, folders: Iterable[Path]) -> bool:
    return any(path.resolve().is_relative_to(folder) for folder in folders)
