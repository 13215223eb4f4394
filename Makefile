# `make demo` and `make test` are all that a fresh machine needs: Python >= 3.10 and an internet connection for pip.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow test-all coverage check figures clean

demo: $(VENV)/installed
	$(BIN)/locality-probe demo

# Two processes, one file of tests at a time each: two cores are all that is asked for. What takes minutes is marked slow.
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test: $(VENV)/installed
	$(TESTS) -m "not slow"

test-slow: $(VENV)/installed
	$(TESTS) -m slow

test-all: test test-slow

coverage: $(VENV)/installed
	$(TESTS) --cov cil --cov locality_probe --cov figures --cov-report term:skip-covered

check: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

figures: $(VENV)/installed
	$(BIN)/python -m figures data/results/demo
	$(BIN)/python -m figures data/results/small --out docs/small

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
