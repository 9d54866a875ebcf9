"""`python -m orchestrator.launch.clusters.wait N PID`: until the Ray cluster has N nodes; prints its head's address.

For batch scripts, which start a head and the other nodes themselves; PID is the process that they wait for.
"""

from __future__ import annotations

import sys
import time

from orchestrator.errors import EXIT_DONE, EXIT_OTHER, OrchestratorError
from orchestrator.launch.workers.ray_train import RaySession

TIMEOUT_S = 300.0


def wait_for_nodes(count: int, process: int, timeout_s: float = TIMEOUT_S) -> str:
    """The head's address, without port, when `count` nodes are alive; to be called on the head.

    Raises OrchestratorError after `timeout_s`, with how many there are, or when `process` has ended.
    """
    until = time.monotonic() + timeout_s
    while True:
        try:
            with RaySession(None):
                import ray

                while (alive := sum(node["Alive"] for node in ray.nodes())) < count:
                    if time.monotonic() > until or not _runs(process):
                        raise OrchestratorError(f"{alive} of {count} nodes joined the Ray cluster in {timeout_s:g} s")
                    time.sleep(1)
                return str(ray.util.get_node_ip_address())
        except OrchestratorError:
            # The head may not listen yet.
            if time.monotonic() > until or not _runs(process):
                raise
            time.sleep(1)


def _runs(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def main() -> int:
    try:
        print(wait_for_nodes(int(sys.argv[1]), int(sys.argv[2])))
    except OrchestratorError as error:
        print(error, file=sys.stderr)
        return EXIT_OTHER
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
