"""Names and places in a job: which are allowed, and what a relative one is relative to."""

from __future__ import annotations

import hashlib
import ipaddress
import os
import re
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

DIGITS = "digits"
REMOTE_SCHEMES = ("http", "https", "s3", "gs")
STORE_SCHEMES = ("s3", "gs")
TRACKING_SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql")
RAY_PACKAGE = "_ray_pkg_"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")


def is_safe_name(text: str) -> bool:
    """Whether a run may have this name: it becomes a folder, a tag and a part of URLs."""
    return _NAME.fullmatch(text) is not None


def scheme(text: str) -> str | None:
    """The scheme of a URL in lower case, None for a plain path."""
    found = _SCHEME.match(text)
    return found.group(1).lower() if found else None


def redacted(text: str) -> str:
    """The text without what may be secret in a URL: user and password, and all behind a question mark."""
    return re.sub(r"(://[^\s?]*)\?\S*", r"\1?***", re.sub(r"//[^/@\s]*@", "//***@", text))


def is_remote(text: str) -> bool:
    """Whether a data set lies in an object store or on a web server."""
    return scheme(text) in REMOTE_SCHEMES


def location_fault(text: str) -> str | None:
    """What is wrong with the place of a data set, None when it can be read."""
    kind = scheme(text)
    if kind in REMOTE_SCHEMES:
        return _remote_fault(text)
    if kind is None or _is_local_url(text):
        return None
    return f"must be {DIGITS}, a path, or a URL that begins with file, {', '.join(REMOTE_SCHEMES)}"


def _remote_fault(text: str) -> str | None:
    """What is wrong with a URL of data; nothing is asked of the network."""
    try:
        parts = urlsplit(text)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        return f"must be a URL ({error})"
    if "@" in parts.netloc:
        return "must hold no user or password (credentials come from the environment)"
    if parts.query or parts.fragment:
        return "must be a URL without ? and # (credentials come from the environment)"
    if not host or "/../" in f"{parts.path}/":
        return "must name a place, as s3://BUCKET/FOLDER, gs://BUCKET/FOLDER or https://HOST/FOLDER"
    if is_link_local(host):
        return "must not be a link-local address (these answer with credentials of the machine, not with data)"
    if parts.scheme.lower() == "http" and not (is_loopback(host) or os.environ.get("ORCHESTRATOR_ALLOW_HTTP") == "1"):
        return "must begin with https:// (http:// is for this machine alone, or with ORCHESTRATOR_ALLOW_HTTP=1)"
    return None


def is_loopback(host: str) -> bool:
    """Whether a host of a URL is this machine."""
    address = _address(host)
    return host.lower() == "localhost" if address is None else address.is_loopback


def is_link_local(host: str) -> bool:
    """Whether a host of a URL is an address of the link, where clouds have their metadata services."""
    address = _address(host)
    return address is not None and (address.is_link_local or any(address in network for network in _METADATA))


_METADATA = (ipaddress.ip_network("fd00:ec2::/32"), ipaddress.ip_network("100.100.100.200/32"))


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None
    mapped = getattr(address, "ipv4_mapped", None)
    return mapped or address


def runs_fault(text: str) -> str | None:
    """What is wrong with the place of the runs, None when it can be used."""
    if is_store(text):
        return _remote_fault(text)
    return None if scheme(text) is None or _is_local_url(text) else f"must be the path of a folder, {_STORES}"


def run_and_step_fault(text: str) -> str | None:
    """What is wrong with the name of a run's weights, None when it may be one."""
    return None if re.fullmatch(r"[^@]+(@\d*)?", text) else "must be RUN or RUN@STEP"


_STORES = "s3://BUCKET/FOLDER or gs://BUCKET/FOLDER"


def is_store(text: str) -> bool:
    """Whether runs lie in an object store."""
    return scheme(text) in STORE_SCHEMES


def runs_here(runs: str) -> str:
    """The folder of the runs on this machine: itself, or the copy of what lies in a store."""
    if not is_store(runs):
        return runs
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    known = f"{runs.rpartition('/')[2]}-{hashlib.sha256(runs.encode()).hexdigest()[:12]}"
    return os.path.abspath(os.path.join(cache, "hff-orchestrator", "runs", known))


def tracking_fault(text: str) -> str | None:
    """What is wrong with the address of the tracking server, None when it can be used."""
    kind = (scheme(text) or "").split("+")[0]
    if kind not in TRACKING_SCHEMES:
        return f"must begin with one of {', '.join(s + '://' for s in TRACKING_SCHEMES)}"
    try:
        parts = urlsplit(text)
    except ValueError as error:
        return f"must be a URL ({error})"
    if kind.startswith("http") and "@" in parts.netloc:
        return "must hold no password (set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD)"
    if parts.password is not None or "password" in parse_qs(parts.query):
        place = "PGPASSWORD or ~/.pgpass" if kind == "postgresql" else "the option file of its client"
        return f"must hold no password ({place} can)"
    return None


def _is_local_url(text: str) -> bool:
    return scheme(text) == "file" and re.match(r"file://(localhost)?/", text, re.IGNORECASE) is not None


def base_folder(job_path: str | Path) -> Path:
    """What relative paths of a job are relative to, absolute.

    The nearest parent of the job file with pyproject.toml or .git, else the folder of the job file.
    """
    folder = Path(os.path.abspath(job_path)).parent
    for parent in (folder, *folder.parents):
        if (parent / "pyproject.toml").exists() or (parent / ".git").exists():
            return parent
    return folder


def absolute(text: str, base: Path) -> str:
    """A path or file URL as an absolute path."""
    if _is_local_url(text):
        text = unquote(urlsplit(text).path)
    return os.path.abspath(base / os.path.expanduser(text))


def elsewhere_fault(text: str, base: Path) -> str | None:
    """What is wrong with a relative path that leads nowhere from `base` but does from the folder that we are in."""
    if text == DIGITS or is_remote(text) or os.path.exists(absolute(text, base)):
        return None
    meant = absolute(text, Path.cwd())
    if not os.path.exists(meant):
        return None
    return f"must begin at {base}, as relative paths of this job do, got {text!r}; did you mean {meant}?"


def absolute_location(text: str, base: Path) -> str:
    """The place of a data set as an absolute path; `digits` and URLs of stores as they are."""
    if is_remote(text):
        return text.rstrip("/")
    return text if text == DIGITS else absolute(text, base)


def absolute_tracking(text: str, base: Path) -> str:
    """A tracking address; a relative sqlite file becomes an absolute one (workers change directory)."""
    prefix = "sqlite:///"
    if not text.startswith(prefix) or text[len(prefix) :].startswith(("/", ":memory:")):
        return text
    return prefix + absolute(text[len(prefix) :], base)


def in_ray_package(job_path: str | Path) -> bool:
    """Whether the job file is a copy that Ray unpacked from a working directory and will delete."""
    return any(part.startswith(RAY_PACKAGE) for part in Path(os.path.abspath(job_path)).parts)


def runs_folder(job_path: str | Path, runs: str) -> tuple[str, str | None]:
    """The absolute folder or the URL of the runs, and a line for the user when they are not where the job says."""
    if is_store(runs):
        return runs.rstrip("/"), None
    relative = scheme(runs) is None and not os.path.isabs(os.path.expanduser(runs))
    if relative and in_ray_package(job_path):
        folder = os.path.expanduser("~/orchestrator-runs")
        return folder, f"runs: {folder} (the job file is in a Ray working-dir package, which is temporary)"
    return absolute(runs, base_folder(job_path)), None
