"""What the server imports from which local workers are forked (`launch/workers/local`); nobody else imports this.

A batch system or a terminal sends its signals to all processes of a job. The server dies of none, nor does a worker
before it can answer: the driver learns through the server how the workers end, and these save first.
"""

from __future__ import annotations

import signal

for _number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # first: the import takes seconds
    signal.signal(_number, signal.SIG_IGN)

from orchestrator.run import worker as worker  # noqa: E402
