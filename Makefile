# make sweep   installs into .venv, fetches the demo's base model, runs experiments/temp_sweep.py
# make test    the same .venv with the test extra: style, types, the whole test suite
# make quick   the everyday part of the tests

PYTHON ?= python3
BIN := .venv/bin

.PHONY: sweep test quick check install demo-model clean

sweep: install demo-model
	$(BIN)/python experiments/temp_sweep.py $(ARGS)

test: .venv/.test check
	$(BIN)/python -m pytest

quick: .venv/.test
	$(BIN)/python -m pytest -m "not slow"

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
