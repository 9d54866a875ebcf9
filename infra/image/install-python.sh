#!/bin/bash
# From SOURCE, a checkout, into TARGET, a virtual environment: this package and everything that it needs, pinned.
set -euo pipefail

[ $# -eq 2 ] || { echo "usage: install-python.sh SOURCE TARGET" >&2; exit 2; }
source="$1"
target="$2"

python3 -m venv "$target"
"$target/bin/python" -m pip install --quiet --disable-pip-version-check -c "$source/constraints.txt" uv
# Whoever runs the image cannot write bytecode: without it every process compiles all that it imports.
"$target/bin/uv" pip install --quiet --no-cache --compile-bytecode --python "$target/bin/python" -c "$source/constraints.txt" \
    "${source}[cluster]"
"$target/bin/orchestrator" --help > /dev/null
