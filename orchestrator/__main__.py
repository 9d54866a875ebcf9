"""`python -m orchestrator`: the same as the command `orchestrator`; what the job files' first line calls."""

import sys

from orchestrator.cli import main

sys.exit(main())
