# make demo: the whole path in a few minutes. make test: the tests. Both set up .venv first.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
.PHONY: demo test
.DEFAULT_GOAL := demo

$(VENV)/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit("nanoPoT needs Python 3.11 or newer, $(PYTHON) is %s: make PYTHON=python3.12" % sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -r requirements.txt
	@touch $@

demo: $(VENV)/ready
	@PATH="$(abspath $(BIN)):$$PATH" sh demo.sh

test: $(VENV)/ready
	$(BIN)/python -m pytest -q tests
