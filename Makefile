# `make demo` and `make test` are all that a fresh machine needs: Python >= 3.10 and an internet connection for pip.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test check figures clean

demo: $(VENV)/installed
	$(BIN)/locality-probe demo

test: $(VENV)/installed
	$(BIN)/python -m pytest

check: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

figures: $(VENV)/installed
	$(BIN)/python -m figures data/results/demo
	$(BIN)/python -m figures data/results/small --out docs/small

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
