# The two commands of a fresh clone: `make demo` and `make test`. Both make .venv on their own.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# One thread: small networks gain nothing from more, and two processes with several threads each stall one another.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test lint wheel clean

demo: $(VENV)/.installed
	rm -rf runs/demo
	$(BIN)/stillhouse run wml --out runs/demo

test: $(VENV)/.tested
	bash .ci/browser
	$(BIN)/pytest -n 2 -m "not data"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy stillhouse

wheel: $(VENV)/.dev
	$(BIN)/python -m build --wheel

clean:
	rm -rf $(VENV) build dist runs/demo

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e .
	touch $@

$(VENV)/.tested: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[test]'
	touch $@ $(VENV)/.installed

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@ $(VENV)/.installed $(VENV)/.tested
