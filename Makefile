PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup test test-all reproduce lint clean

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[test]"
	touch $@

test: setup
	$(BIN)/python -m pytest -q -m "not gpu and not slow"

test-all: setup
	$(BIN)/python -m pytest -q -m "not gpu"

reproduce: setup
	$(BIN)/dora-lab reproduce --profile mini --seeds 3

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv runs
