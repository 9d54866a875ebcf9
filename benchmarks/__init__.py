"""One script per claim; each prints a table and writes benchmarks/results/NAME.json."""
