# make sweep   installs into .venv, fetches the demo's base model, runs experiments/temp_sweep.py
# make test    the same .venv with the test extra: style, types, the whole test suite
# make quick   the everyday part of the tests

PYTHON ?= python3
BIN := .venv/bin
# One thread a worker: the tests' models are so small that threads would mostly wait for one another. The tests on a Slurm come
# after the others, one bed for all, and wait side by side by themselves.
PARALLEL := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist worksteal

.PHONY: sweep test quick check install demo-model clean

sweep: install demo-model
	$(BIN)/python experiments/temp_sweep.py $(ARGS)

test: .venv/.test check
	$(PARALLEL) -m "not slurm"
	$(BIN)/python -m pytest -m slurm

quick: .venv/.test
	$(PARALLEL) -m "not slow"

check: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/mypy

install: .venv/.install

demo-model: .venv/.install
	$(BIN)/python scripts/fetch_demo_model.py

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ksweep needs Python 3.11 or newer; set PYTHON=python3.11")'
	$(PYTHON) -m venv .venv

# torch first and alone: a range in another package must not pull in a newer build.
.venv/.install: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[demo]"
	touch $@

.venv/.test: .venv/.install
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[demo,test]"
	touch $@

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache
