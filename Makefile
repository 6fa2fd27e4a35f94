# make demo: the whole path in a few minutes. make test: the tests. Both set up .venv first.
# make run CKPT=out-gpt2-pot4 PROMPT="The sky is" ARGS=--temperature=0: text from a packed model, without Python.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
.PHONY: demo test run
.DEFAULT_GOAL := demo

$(VENV)/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit("nanoPoT needs Python 3.11 or newer, $(PYTHON) is %s: make PYTHON=python3.12" % sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -r requirements.txt
	@touch $@

demo: $(VENV)/ready
	@PATH="$(abspath $(BIN)):$$PATH" sh demo.sh

test: $(VENV)/ready
	$(BIN)/python -m pytest -q -n 2 --dist loadfile tests

NATIVE := $(or $(if $(filter x86_64,$(shell uname -m)),-march=native),$(if $(filter arm64 aarch64,$(shell uname -m)),-mcpu=native))

pot_kernel/run: $(addprefix pot_kernel/,run.cpp decode.cpp pot.cpp shift.h unicode.h)
	$(CXX) -O3 $(NATIVE) $(CXXFLAGS) -std=c++17 -pthread -o $@ $< -ldl

run: export RUN_PROMPT = $(PROMPT)
run: pot_kernel/run
	@pot_kernel/run --ckpt="$(or $(CKPT),out)" --prompt="$$RUN_PROMPT" $(ARGS)
