"""Workers as Ray actors under Ray Train: placement, rendezvous, and nothing else. Activations never touch Ray."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from orchestrator.errors import JobError, OrchestratorError
from orchestrator.launch.signals import begun_beside, held_back, kept_handlers
from orchestrator.launch.workers.environment import copying
from orchestrator.launch.workers.local import WorkerFailure
from orchestrator.run.records.start import without_collector
from orchestrator.run.worker import Assignment

# Set before ray is imported anywhere: no usage statistics, the current Train, quiet workers.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # Our workers look for themselves whether their node is about to be taken away, and leave in good order.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # Ray's own default of 15 lets anything else on the machine starve the training.
    "RAY_worker_niceness": "0",
}

# For a Ray of our own on one machine: processes that would start and do nothing. Every job's workers have an
# environment of their own, so workers started ahead are thrown away.
OWN_ENVIRONMENT = {
    "RAY_prestart_worker_first_driver": "0",
}


# How long to wait for a node to answer, and for what an ended attempt held to be given back.
_ANSWER_S = 20.0
_RELEASE_S = 15.0


class RaySession:
    """A connection to the cluster named by RAY_ADDRESS, or a Ray of our own on this machine."""

    def __init__(self, cluster: dict[str, Any] | None) -> None:
        """`cluster` is the section of the one run that the Ray is for; None for many that share what there is."""
        self._cluster = cluster
        self._already = self.own = False

    @property
    def alone(self) -> bool:
        """Whether what runs on this connection ends with it: it was not there before."""
        return not self._already

    @property
    def waiting(self) -> str:
        """A line for the time that connecting takes."""
        address = os.environ.get("RAY_ADDRESS")
        return f"Waiting for the Ray cluster at {address} ..." if address else "Starting Ray on this machine ..."

    @property
    def where(self) -> str:
        """A line about what was connected to."""
        import ray

        nodes = sum(bool(node["Alive"]) for node in ray.nodes())
        return f"Ray on {nodes} {'node' if nodes == 1 else 'nodes'}, {ray.cluster_resources().get('CPU', 0):g} cores"

    def __enter__(self) -> RaySession:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        with warnings.catch_warnings(), kept_handlers(), held_back():
            warnings.simplefilter("ignore")
            with without_collector():
                import ray

        # What it says of itself below that are stack traces beside the exception that is told here.
        # A second process could otherwise never join a cluster that this process believes to have.
        address = os.environ.get("RAY_ADDRESS")
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
        self._already = ray.is_initialized()
        if self._already:
            return self
        try:
            with kept_handlers():
                if address:
                    ray.init(address=address, **options)
                else:
                    self._start_own(options)
        except Exception as error:  # Ray raises a bare Exception too, when its own processes start too slowly
            where = f"the Ray cluster at RAY_ADDRESS={address}" if address else "a local Ray"
            raise OrchestratorError(f"{where} cannot be used: {error}{self._remedy(error)}") from error
        except KeyboardInterrupt:
            ray.shutdown()
            raise
        return self

    def _start_own(self, options: dict[str, Any]) -> None:
        import ray

        self.own = True
        for name, value in OWN_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        options = {**options, "include_dashboard": False, "num_cpus": self._local_cpus()}
        # Interrupted half-way it leaves agents behind, which look for their node for up to a minute.
        with held_back():
            try:
                ray.init(address="local", **options)
            except Exception:
                # Its agents have 15 s to start, a number nobody can change (ray-project/ray#65983): on a machine that
                # is busy with something else the second try, with everything in the page cache, mostly succeeds.
                ray.init(address="local", **options)

    def _remedy(self, error: Exception) -> str:
        if not self.own or "timed out" not in str(error):
            return ""
        other = "" if self._cluster is None else ", or add --set cluster.launcher=process"
        return f"\nThis machine is very busy: try again{other}. Nothing is lost."

    def __exit__(self, *exc: object) -> None:
        if not self._already:
            import ray

            ray.shutdown()

    def _local_cpus(self) -> int:
        """At least what the job asks for: on one machine the user decides how many workers share a core."""
        cores = os.cpu_count() or 1
        if self._cluster is None:
            return cores
        needed = self._cluster["workers"] * self._cluster["cpus_per_worker"]
        return max(cores, -(-int(needed * 1000) // 1000))

    def check_resources(self) -> None:
        """Refuse a job that this cluster can never place, with the sum. Raises JobError."""
        import ray

        assert self._cluster is not None
        if self._cluster["min_workers"] is not None:
            return  # an elastic job waits for nodes
        there = ray.cluster_resources()
        workers = self._cluster["workers"]
        needed = {"CPU": workers * self._cluster["cpus_per_worker"]}
        if self._cluster["use_gpu"]:
            needed["GPU"] = workers
        for kind, amount in needed.items():
            if amount > there.get(kind, 0) + 1e-6:
                raise JobError(
                    f"cluster.workers: {workers} workers need {amount:g} {kind}, the Ray cluster has "
                    f"{there.get(kind, 0):g}; use fewer workers, lower cluster.cpus_per_worker or add nodes"
                )

    def room(self) -> int:
        """Workers that fit on the nodes that answer, each node for itself, in what nobody else holds."""
        nodes = _answering_nodes()
        whole = sum(self._workers_in(node["Resources"]) for node in nodes)
        until = time.monotonic() + _RELEASE_S
        # What the last attempt held comes back a moment after its end.
        while self._free() < whole and time.monotonic() < until:
            time.sleep(0.5)
        return min(whole, self._free())

    def spare(self) -> int:
        """Workers that fit into what nobody holds."""
        return self._free()

    def _free(self) -> int:
        from ray._private.state import state

        from orchestrator.launch.workers.ray_group import draining_nodes

        going = draining_nodes()
        there: Counter[str] = Counter()
        for node, free in state.available_resources_per_node().items():
            if node not in going:
                there.update(free)
        return self._workers_in(there)

    def _workers_in(self, resources: Mapping[str, float]) -> int:
        assert self._cluster is not None
        count = int(resources.get("CPU", 0) / self._cluster["cpus_per_worker"] + 1e-6)
        return min(count, int(resources.get("GPU", 0))) if self._cluster["use_gpu"] else count


def _answering_nodes() -> list[dict[str, Any]]:
    """The nodes that stay and run a task in time: a dead one is listed as alive for a while."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from orchestrator.launch.workers.ray_group import draining_nodes

    def answer() -> bool:
        return True

    asked, going = {}, draining_nodes()
    for node in ray.nodes():
        if node["Alive"] and node["NodeID"] not in going:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(answer)
            asked[task.remote()] = node
    answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_ANSWER_S)
    found = []
    for reference in answered:
        with suppress(ray.exceptions.RayError):  # the node went while it was asked
            ray.get(reference)
            found.append(asked[reference])
    return found


def begin_ray(assignment: Assignment, storage: str) -> Callable[[], None]:
    """Begin one attempt under Ray Train; what is returned waits for its end.

    It raises WorkerFailure when any worker failed; the workers' own reports in the run folder say why.
    """
    with held_back(), without_collector():
        from ray.exceptions import ActorDiedError
        from ray.train import FailureConfig, RunConfig, ScalingConfig

        from orchestrator.launch.workers.ray_group import Trainer

    cluster = assignment.job["cluster"]
    resources = {"CPU": cluster["cpus_per_worker"], **({"GPU": 1} if cluster["use_gpu"] else {})}
    trainer = Trainer(
        assignment,
        scaling_config=ScalingConfig(
            num_workers=sum(assignment.replicas), use_gpu=cluster["use_gpu"], resources_per_worker=resources
        ),
        run_config=RunConfig(
            name=f"attempt-{assignment.attempt}",
            storage_path=storage,
            worker_runtime_env={"env_vars": copying()},
            # Restarts are the driver's decision: only it knows which checkpoint is the newest whole one.
            failure_config=FailureConfig(max_failures=0, max_preemption_failures=0),
        ),
    )
    ended = begun_beside(trainer.fit, "ray-train")

    def wait() -> None:
        try:
            ended()
        except BaseException as error:
            if isinstance(error, ActorDiedError):
                _give_places_back()
            raise WorkerFailure(f"Ray Train: {error}") from error

    return wait


def _give_places_back() -> None:
    """Remove the placement groups of our controllers that are gone: Ray keeps them until the whole job ends.

    Ray Train's own helper for that asks the dashboard, which a Ray of our own has not got.
    """
    import ray
    from ray._private.state import state
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    job = bytes.fromhex(ray.get_runtime_context().get_job_id())
    for packed in state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(packed)
        by_an_actor = not ray.ActorID(group.creator_actor_id).is_nil()
        if group.creator_job_id == job and by_an_actor and group.creator_actor_dead:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
