"""Hyperspherical Forward-Forward: greedy, strictly local training of networks. Needs torch alone."""
