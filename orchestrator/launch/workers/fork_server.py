"""What the server imports from which local workers are forked (`launch/workers/local`); nobody else imports this.

A batch system sends its signals to all processes of a job. The server dies of none: the driver learns through it how
the workers end, and these save first.
"""

from __future__ import annotations

import signal

from orchestrator.run import worker as worker

for _number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(_number, signal.SIG_IGN)
