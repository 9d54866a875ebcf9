# `make quickstart` and `make test` need nothing but Python >= 3.11 with venv; every target sets up .venv by itself.
SHELL := /bin/bash
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	command -v $$p >/dev/null && $$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
STAMP := .venv/.installed
export RAY_USAGE_STATS_ENABLED = 0
# Where a shell says so, every process compiles all that it imports anew: half of the time until the first step.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: quickstart test test-all test-gpu soak rehearsal docs check bench bench-full clean-venv

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python >= 3.11 with venv is needed (on Debian: apt-get install python3 python3-venv)"; exit 1; }
	@echo "Setting up .venv with $(PYTHON) (one to ten minutes: PyTorch with its CUDA libraries is downloaded; 6 GB of disk)"
	@# Without the stamp, what is there is of a set-up that was interrupted.
	@test -e $@ || $(PYTHON) -m venv --clear .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt uv
	@$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[dev]'
	@# Once, before the processes of the first run would each compile the same.
	@$(BIN)/python -c 'import orchestrator.launch.driver, mlflow.tracking, ray.train.torch, sklearn.datasets'
	@touch $@

quickstart: $(STAMP)  ## set-up and a real run: embedded digits, two Ray workers, two stages, sqlite MLflow
	@$(BIN)/orchestrator run jobs/quickstart.yaml --resume never || { code=$$?; \
		echo "To run it without Ray: $(BIN)/orchestrator run jobs/quickstart.yaml --set cluster.launcher=process"; exit $$code; }

test: $(STAMP)  ## set-up and the tests; one real Ray run and one real job submission among them
	$(BIN)/python -m pytest -m 'not slow and not gpu'

test-all: $(STAMP)  ## all tests, the slow ones too
	$(BIN)/python -m pytest

test-gpu: $(STAMP)  ## the tests that need a GPU; skipped without one, those of NCCL with fewer than two
	$(BIN)/python -m pytest -m gpu

clean-venv:  ## forget the set-up; the next target makes it afresh
	rm -rf .venv

soak: $(STAMP)  ## ten minutes of random faults against a real run; then the proof that nothing was lost
	$(BIN)/python -m tests.faults.soak

rehearsal: $(STAMP)  ## a Ray cluster of four nodes on this machine: submit, lose a node, stop, go on
	$(BIN)/python -m tests.rehearsal

docs: $(STAMP)  ## the documentation as a site in build/site; a broken link is an error
	$(BIN)/python -m orchestrator.job.reference > docs/job-reference.md
	$(BIN)/mkdocs build

check: $(STAMP)  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)  ## smoke of every benchmark, 20 minutes on 2 cores
	$(BIN)/python -m benchmarks.run

bench-full: $(STAMP)  ## the published numbers
	$(BIN)/python -m benchmarks.run --full
