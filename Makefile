# make quickstart   set up, then run the main job on one machine with a generated log
# make test         set up, then lint, types, import rules and the tests
# make test-long    the same with the tests that take minutes each
# make check        set up, then lint, types and import rules alone
# make clean        remove what the other targets made

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev

.PHONY: quickstart test test-long check clean

# One file's tests run in one process; those that take long begin first (tests/conftest.py).
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

quickstart: $(INSTALLED)
	$(BIN)/recgpt quickstart

test: check
	$(PYTEST)

test-long: check
	$(PYTEST) --long

check: $(INSTALLED_DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) build dist *.egg-info quickstart
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

$(BIN)/python:
	@command -v $(PYTHON) > /dev/null || { echo "make: no $(PYTHON) here; install Python 3.10 or newer, or name one: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "make: $(PYTHON) is $$($(PYTHON) --version 2>&1), RecGPT needs 3.10 or newer; name one: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "make: $(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv"; exit 1; }

$(INSTALLED): pyproject.toml | $(BIN)/python
	@echo "Installing RecGPT into $(VENV); the first time takes some minutes ..."
	@$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(INSTALLED_DEV): pyproject.toml | $(BIN)/python
	@echo "Installing RecGPT and its tools into $(VENV); the first time takes some minutes ..."
	@$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $(INSTALLED) $@
