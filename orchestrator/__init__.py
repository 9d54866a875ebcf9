"""Distributed training of greedy, layer-local networks: jobs, data, pipeline, runs, launchers, pages."""

__version__ = "0.2.0"
