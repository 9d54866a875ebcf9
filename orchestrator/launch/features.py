"""Make the features that a job needs: decide what is missing, share its shards among workers, publish.

Also `orchestrator data features`, in words.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from orchestrator.data.cached.feature_store import MadeShard, is_whole, kept_shards, publish, samples_written
from orchestrator.data.cached.features import FeatureFolders
from orchestrator.data.command import Ticker
from orchestrator.data.stores.remote_index import open_data
from orchestrator.errors import EXIT_DONE, Interrupted, JobError
from orchestrator.job import paths
from orchestrator.job.load import load_job
from orchestrator.job.network import cached_features
from orchestrator.job.resolved import job_to_dict
from orchestrator.job.schema import Job
from orchestrator.launch.signals import StopSignal
from orchestrator.launch.workers.crews import Recruit, crew_for
from orchestrator.run.datasets import Datasets, open_datasets, prepare_embedded
from orchestrator.run.features import Wanted, ask_to_stop, examine, wanted_sets
from orchestrator.run.planning import resolved
from orchestrator.storage import alone

_POLL_S = 0.25


class Crew(Protocol):
    """Workers that compute shards; `size` of them are busy at a time."""

    size: int

    def submit(self, wanted: Wanted, number: int, tick: Callable[[], None]) -> Any:
        """Begin a shard. A crew that works in this process calls `tick` meanwhile."""

    def wait(self, flying: Sequence[Any], timeout_s: float) -> Sequence[Any]:
        """Those of the begun shards that have ended."""

    def result(self, ended: Any) -> MadeShard:
        """The shard, or the worker's error."""


def features_of(
    job: Job,
    datasets: Datasets,
    weights_from: str | None,
    *,
    say: Callable[[str], None],
    event: Callable[[dict[str, Any]], None],
    may_make: bool = True,
) -> FeatureFolders | None:
    """Where the features of a job's frozen backbone lie, made now where they are missing; None for other jobs.

    `weights_from` is the checkpoint that the run starts from. Raises JobError where features are missing and must
    not be made.
    """
    if cached_features(job) is None:
        return None
    values, classes = job_to_dict(job), len(datasets.classes)
    trunk = examine(values, classes, weights_from)
    sets, folders = wanted_sets(values, datasets, trunk)
    if not may_make and not all(is_whole(wanted.plan) for wanted in sets):
        raise JobError(
            "features.cache: the features of this job are not there yet, and torchrun's workers do not make them; "
            "make them first with `orchestrator data features JOB`, or set features.cache to false"
        )
    Maker(crew_for(Recruit(values, classes, trunk, weights_from)), say, event).make(sets)
    return folders


def features_command(job_path: str, overrides: Sequence[str]) -> int:
    """`orchestrator data features JOB`: make all that a job will train on; returns the exit code."""
    job = load_job(job_path, overrides, tell=print)
    if cached_features(job) is None:
        raise JobError(
            f"{job_path}: has no features to make: only a transfer job with model.freeze all and features.cache true "
            "trains on features that are made beforehand"
        )
    job = resolved(job).model_copy(update={"runs": paths.runs_here(job.runs)})
    runs = Path(job.runs)
    values = job_to_dict(job)
    prepare_embedded(values["data"], runs)
    datasets = open_datasets(values)
    features_of(job, datasets, None, say=print, event=lambda _: None)
    return EXIT_DONE


@dataclass
class Maker:
    """Makes feature sets one after the other; `event` takes a line for events.jsonl."""

    crew: Callable[[], AbstractContextManager[Crew]]
    say: Callable[[str], None]
    event: Callable[[dict[str, Any]], None]
    _stopped: bool = field(default=False, init=False)
    _now: Wanted | None = field(default=None, init=False)

    def make(self, sets: Sequence[Wanted]) -> None:
        """Make what is missing. Raises Interrupted when it is stopped; finished shards are kept."""
        missing = [wanted for wanted in sets if not self._there(wanted)]
        if not missing:
            return
        with StopSignal(self._stop), self.crew() as crew:
            for wanted in missing:
                self._now = wanted
                self._make(wanted, crew)
            self._refuse_to_go_on()  # told between the last shard and here

    def _stop(self, reason: str) -> None:
        self._stopped = True
        if self._now is not None and self._now.plan.partial.is_dir():
            ask_to_stop(self._now.plan)
        self.say(f"{reason}: leaving after the batch that is being computed (again: leave at once)")

    def _refuse_to_go_on(self) -> None:
        if self._stopped:
            raise Interrupted(
                "stopped while features were computed; finished shards are kept: run the same command again to go on"
            )

    def _there(self, wanted: Wanted) -> bool:
        if not is_whole(wanted.plan):
            return False
        self.say(f"Features of {wanted.name}: {wanted.plan.samples} images, in {wanted.plan.folder}")
        self._tell(wanted, 0, 0.0)
        return True

    def _tell(self, wanted: Wanted, made: int, seconds: float) -> None:
        self.event(
            {
                "event": "features",
                "set": wanted.name,
                "folder": wanted.plan.folder,
                "images": wanted.plan.samples,
                "numbers": sum(wanted.plan.parts),
                "made": made,
                "seconds": seconds,
                "images_per_second": made / seconds if made else None,
            }
        )

    def _make(self, wanted: Wanted, crew: Crew) -> None:
        plan = wanted.plan

        def tell_waiting() -> None:
            self.say(f"Features of {wanted.name} are being made by another process; waiting for it")

        with alone(plan.lock, lambda: self._stopped, tell_waiting):
            self._refuse_to_go_on()
            if self._there(wanted):  # the other process has made it
                return
            kept = kept_shards(plan)
            have = sum(made.shard.samples for made in kept)
            if kept:
                self.say(f"Features of {wanted.name}: {have} of {plan.samples} images are there already")
            numbers = sorted(set(range(len(plan.ranges))) - {made.number for made in kept})
            ticker = Ticker("computed features of", done=have)
            made = self._shards(wanted, crew, numbers, lambda: ticker(samples_written(plan), plan.samples))
            publish(plan, open_data(wanted.source, cache=wanted.cache), [*kept, *made])
            seconds = ticker.seconds
        computed = plan.samples - have
        self.say(
            f"Features of {wanted.name}: {computed} images, {sum(plan.parts)} numbers each, in {seconds:.1f} s "
            f"({computed / max(seconds, 1e-9):.0f} images/s); kept in {plan.folder}"
        )
        self._tell(wanted, computed, seconds)

    def _shards(self, wanted: Wanted, crew: Crew, numbers: Sequence[int], tick: Callable[[], None]) -> list[MadeShard]:
        todo, flying = deque(numbers), list[Any]()
        made: list[MadeShard] = []
        failure: BaseException | None = None
        while flying or (todo and failure is None):
            self._refuse_to_go_on()
            while todo and failure is None and len(flying) < crew.size:
                flying.append(crew.submit(wanted, todo.popleft(), tick))
            for ended in crew.wait(flying, _POLL_S):
                flying.remove(ended)
                try:
                    made.append(crew.result(ended))
                except Exception as error:
                    # The others are left in order, so that their finished shards count next time.
                    failure = failure or error
                    ask_to_stop(wanted.plan)
            tick()
        if failure is not None:
            self._refuse_to_go_on()
            raise failure
        return made
