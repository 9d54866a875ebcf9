"""MLflow: runs, parameters and metrics. Training never waits for it.

The driver creates database, experiment and run. Metrics reach MLflow from the run's own events.jsonl, sent by a
thread of the driver, so the events are also the spool: what a dead server missed is sent by `replay`.
"""

from __future__ import annotations

import fcntl
import logging
import os
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from orchestrator.errors import JobError, OrchestratorError, first_line
from orchestrator.run.folder import RunFolder, read_json, write_json
from orchestrator.run.records.start import without_collector

_POLL_S = 1.0
_REQUEST_TIMEOUT_S = 5
_MAX_PARAM = 500
# One thread of this process: that of an ended attempt may still be held up by a request when the next one's begins.
_SENDING = threading.Lock()
# More have no charts of their own.
_MOST_WORKERS = 16
# Of each stage's time, together 1.
_SHARES = ("busy_fraction", "wait_input_fraction", "wait_output_fraction", "all_reduce_fraction")
# Metrics of data that are read from afar, by their name in the event.
_REMOTE = {
    "hits": "data/cache_hits",
    "misses": "data/cache_misses",
    "bytes": "data/remote_bytes",
    "retries": "data/remote_retries",
    "damaged": "data/damaged_shards",
    "wait_s": "data/remote_wait_seconds",
}


def resolve_uri(uri: str | None, runs: Path) -> str:
    """The job's tracking URI, or an sqlite database beside the runs."""
    return uri or f"sqlite:///{runs / 'mlflow.db'}"


@contextmanager
def client_of(uri: str) -> Iterator[Any]:
    """An MLflow client that gives up soon and keeps its own news to itself."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(_REQUEST_TIMEOUT_S))
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with without_collector():
            from mlflow.tracking import MlflowClient

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.ERROR)
        yield MlflowClient(tracking_uri=uri)


def _unusable(uri: str, error: Exception) -> str:
    return (
        f"tracking.uri: {uri} cannot be used: {first_line(error)}\n"
        "Start the server, correct tracking.uri, or leave it out to track in a database beside the runs."
    )


def _database(uri: str) -> Path | None:
    """The file of an sqlite database; None for any other store."""
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]) if uri.startswith("sqlite:///") else None


@contextmanager
def _alone(uri: str) -> Iterator[None]:
    """Runs that start at the same time make tables and experiment one after the other; a server sees to that itself."""
    path = _database(uri)
    if path is None:
        yield
        return
    with path.with_name(f".{path.name}.lock").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def refuse_unwritable(uri: str) -> None:
    """Raise JobError where the sqlite database of `uri` cannot be written; no server is asked."""
    path = _database(uri)
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        open(path, "ab").close()  # sqlite takes an empty file for a new database
    except OSError as error:
        raise JobError(_unusable(uri, error)) from None


def open_store(uri: str) -> None:
    """Import MLflow and make its tables, where they are ours to make, so that `create_run` need not wait for it."""
    # What does not work is said by create_run, with the remedy.
    with suppress(Exception), _alone(uri), client_of(uri) as client:
        if uri.startswith("sqlite:"):
            client.search_experiments(max_results=1)


def create_run(
    uri: str,
    experiment: str,
    name: str,
    *,
    params: Mapping[str, Any],
    tags: Mapping[str, Any],
    artifacts: Path,
    run_id: str | None = None,
    note: str = "",
    datasets: Sequence[Mapping[str, str]] = (),
) -> str:
    """Create the run, or reopen `run_id` for another attempt where it is known. Returns its id.

    Parameters and `datasets` (description.dataset_inputs) are logged once; MLflow refuses other values for parameters
    later. `note` is the description that its page shows. Raises OrchestratorError when the server cannot be reached,
    JobError when a database cannot be written.
    """
    refuse_unwritable(uri)
    from mlflow.entities import Param, RunTag

    tags = {**tags, "mlflow.note.content": note} if note else tags

    try:
        with _alone(uri), client_of(uri) as client:
            if run_id is None or not _reopened(client, run_id):
                run_id = _new_run(client, uri, experiment, name, artifacts)
                logged = [Param(key, str(value)[:_MAX_PARAM]) for key, value in params.items()]
                for start in range(0, len(logged), 90):
                    client.log_batch(run_id, params=logged[start : start + 90])
                if datasets:
                    client.log_inputs(run_id, [_input(values) for values in datasets])
            client.log_batch(run_id, tags=[RunTag(key, str(value)) for key, value in tags.items()])
    except Exception as error:  # mlflow raises its own, requests' and sqlalchemy's errors alike
        raise OrchestratorError(_unusable(uri, error)) from error
    return str(run_id)


def _reopened(client: Any, run_id: str) -> bool:
    """Go on in a run; False where it is not known, since its database is on another machine."""
    from mlflow.exceptions import MlflowException

    try:
        client.update_run(run_id, status="RUNNING")
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False
    return True


def _input(values: Mapping[str, str]) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    given = {key: values[key] for key in ("name", "digest", "source", "profile")}
    return DatasetInput(
        Dataset(source_type="webdataset", **given), [InputTag("mlflow.data.context", values["context"])]
    )


def _new_run(client: Any, uri: str, experiment: str, name: str, artifacts: Path) -> str:
    found = client.get_experiment_by_name(experiment)
    if found is None:
        location = artifacts.as_uri() if uri.startswith("sqlite") else None
        experiment_id = client.create_experiment(experiment, artifact_location=location)
    else:
        experiment_id = found.experiment_id
    return str(client.create_run(experiment_id, run_name=name).info.run_id)


def _loaded(event: Mapping[str, Any]) -> dict[str, float]:
    """Decoding and left-out images of an epoch's line; runs of before these were counted have none."""
    loader = event.get("loader") or {"images": 0}
    decoding = {"data/decode_ms": 1000 * loader["decode_s"] / loader["images"]} if loader["images"] else {}
    return decoding | {"data/skipped_samples": float(sum((event.get("skipped") or {}).values()))}


def _used(workers: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """MLflow's own names and units; of many workers the most that any takes, so that pages stay readable."""
    units = {"memory_bytes": ("memory_megabytes", 1e-6), "gpu_memory_bytes": ("gpu_memory_megabytes", 1e-6)}
    units |= {"cores": ("cpu_utilization_percentage", 100.0)}
    if len(workers) > _MOST_WORKERS:
        keys = workers[0]
        return {f"system/most_{units[key][0]}": units[key][1] * max(w[key] for w in workers) for key in keys}
    return {
        f"system/worker_{rank}_{units[key][0]}": units[key][1] * value
        for rank, worker in enumerate(workers)
        for key, value in worker.items()
    }


def epoch_metrics(event: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of one line of events.jsonl; empty for lines without any."""
    metrics: dict[str, float | None] = {}
    if event["event"] == "epoch":
        losses = event["train_loss"]
        metrics["train/images_per_second"] = event["images_per_second"]
        metrics["train/learning_rate"] = event["learning_rate"]
        metrics["train/loss"] = next((x for x in reversed(losses) if x is not None), None)
        for i, loss in enumerate(losses):
            metrics[f"layer/{i:02d}/train_loss"] = loss
        for i, scale in enumerate(event.get("scale") or []):
            metrics[f"layer/{i:02d}/scale"] = scale
        for share in _SHARES:
            for i, value in enumerate(event.get(share) or []):
                metrics[f"stage/{i}/{share}"] = value
        metrics |= _loaded(event) | _used(event.get("workers") or [])
        metrics |= {_REMOTE[name]: value for name, value in (event.get("remote") or {}).items()}
    if event["event"] == "first_step":
        metrics = {f"start/{name.replace(' ', '_')}_seconds": s for name, s in event["seconds"].items()}
        metrics["start/total_seconds"] = sum(event["seconds"].values())
    if event["event"] in ("epoch", "final"):
        metrics["val/top1"], metrics["val/top5"] = event["val_top1"], event["val_top5"]
        for i, top1 in enumerate(event["layer_val_top1"] or []):
            metrics[f"layer/{i:02d}/val_top1"] = top1
    return {key: float(value) for key, value in metrics.items() if value is not None}


def _send(uri: str, run_id: str, events: Sequence[Mapping[str, Any]]) -> None:
    from mlflow.entities import Metric

    metrics = [
        Metric(key, value, int(event["time"] * 1000), int(event["step"]))
        for event in events
        for key, value in epoch_metrics(event).items()
    ]
    with client_of(uri) as client:
        for start in range(0, len(metrics), 900):
            client.log_batch(run_id, metrics=metrics[start : start + 900])


def replay(uri: str, run_id: str, run_dir: Path) -> int:
    """Send every event that MLflow has not got yet; returns how many. Raises what MLflow raises."""
    folder = RunFolder(run_dir)
    sent = run_dir / "tracked.json"
    with _SENDING:
        done = read_json(sent) or {}
        offset = done["bytes"] if done.get("run_id") == run_id else 0
        events, end = folder.read_events(offset)
        if events:
            _send(uri, run_id, events)
        if end != offset:
            write_json(sent, {"bytes": end, "run_id": run_id})
    return len(events)


def replay_all(uri: str, run_id: str, run_dir: Path) -> int:
    """`replay` for the command line. Raises OrchestratorError when the server still does not answer."""
    try:
        return replay(uri, run_id, run_dir)
    except Exception as error:  # whatever MLflow's stack raises means the same to the user
        raise OrchestratorError(_unusable(uri, error)) from error


class EventSink:
    """Sends a run's events to MLflow while it runs; a dead server costs one warning, nothing else."""

    def __init__(self, uri: str, run_id: str, run_dir: Path) -> None:
        self._uri, self._run_id, self._run_dir = uri, run_id, run_dir
        self._ended = threading.Event()
        self._warned = False
        self._thread = threading.Thread(target=self._send_all, name="tracking", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Send what is left and end; waits no longer than a few requests take."""
        self._ended.set()
        self._thread.join(4 * _REQUEST_TIMEOUT_S)

    def _send_all(self) -> None:
        while not self._ended.wait(_POLL_S):
            self._try()
        self._try()

    def _try(self) -> None:
        try:
            replay(self._uri, self._run_id, self._run_dir)
        except Exception as error:  # whatever MLflow's stack raises, the run goes on
            if not self._warned:
                self._warned = True
                RunFolder(self._run_dir).append_event(
                    {"event": "warning", "text": f"MLflow does not answer ({type(error).__name__}); metrics wait "
                     "in events.jsonl and are sent when it does, or by `orchestrator runs replay`"}
                )  # fmt: skip


def finish_run(uri: str, run_id: str | None, status: str, artifacts: Sequence[Path] = ()) -> str | None:
    """Set the final status (FINISHED, FAILED, KILLED) and log files. Returns a warning instead of raising."""
    if run_id is None:
        return None
    try:
        with client_of(uri) as client:
            for path in artifacts:
                client.log_artifact(run_id, str(path))
            client.set_terminated(run_id, status=status)
    except Exception as error:  # a finished run must not fail for its tracking
        return f"MLflow: the run's end could not be logged: {first_line(error)}"
    return None


def note(
    uri: str,
    run_id: str,
    *,
    tags: Mapping[str, str] | None = None,
    metrics: Mapping[str, float] | None = None,
    status: str | None = None,
) -> str | None:
    """Add tags, metrics and perhaps a final status to a run. Returns a warning instead of raising."""
    from mlflow.entities import Metric, RunTag

    now = int(time.time() * 1000)
    try:
        with client_of(uri) as client:
            client.log_batch(
                run_id,
                metrics=[Metric(key, value, now, 0) for key, value in (metrics or {}).items()],
                tags=[RunTag(key, value) for key, value in (tags or {}).items()],
            )
            if status is not None:
                client.set_terminated(run_id, status=status)
    except Exception as error:  # a finished search must not fail for its tracking
        return f"MLflow: tags could not be logged: {first_line(error)}"
    return None
