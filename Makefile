# Every target that needs the set-up makes it: .venv with the exact versions of constraints.txt.
# Needed beforehand: Python 3.11 with pip (Debian: python3 python3-pip), make, git.

PYTHON  ?= $(firstword $(shell command -v python3.11 python3))
EXTRAS  ?= preprocess,dev
WORKERS ?= 2
PYTEST_ARGS ?=

VENV    := .venv
BIN     := $(VENV)/bin
READY   := $(VENV)/.ready
PARTIAL := $(VENV)/.incomplete
SOURCES := $(wildcard tccp preprocessing ray_jobs)

# Two test processes on two cores: one thread each, so that they neither fight for cores nor change the order of sums.
ONE_THREAD := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENCV_FOR_THREADS_NUM=1
PYTEST     := $(ONE_THREAD) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help demo test check clean setup
MAKEFLAGS += --no-print-directory

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-7s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(READY)  ## train small and generate a talking head into a scene: out/demo.mp4, out/demo.png, out/demo.json
	@$(BIN)/tccp demo --out out

test: $(READY)  ## the whole test suite, on two cores; PYTEST_ARGS=... goes to pytest
	@$(PYTEST) --durations 15 $(PYTEST_ARGS)

check: $(READY)  ## lint, format, types, layers and the fast tests
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy $(SOURCES)
	@$(BIN)/lint-imports
	@$(PYTEST) -q -m 'not slow' $(PYTEST_ARGS)

clean:  ## remove what make made here: .venv, out and caches
	@rm -rf $(VENV) out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@find $(SOURCES) tests -name __pycache__ -type d -prune -exec rm -rf {} +

setup: $(READY)  ## .venv alone, as the other targets make it on need

# .venv/.incomplete stands while a set-up runs: found at the start of one, that venv was interrupted and is made anew.
# Without pip of its own at first: Debian's venv would need one package more for that than Debian's pip does.
$(READY): pyproject.toml constraints.txt .ci/system_libraries.py
	@"$(PYTHON)" -c 'import sys, pip; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || { \
		echo "TCCP needs Python 3.11 with pip (Debian 12: apt-get install python3 python3-pip); make PYTHON=/path/to/python3.11 names one" >&2; \
		exit 1; }
	@$(PYTHON) .ci/system_libraries.py
	@if [ -e $(PARTIAL) ]; then rm -rf $(VENV); fi; mkdir -p $(VENV); touch $(PARTIAL); rm -f $@
	@echo "Setting up $(VENV) (a few minutes the first time) ..." >&2
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv --without-pip $(VENV)
	@$(PYTHON) -m pip --python $(BIN)/python --disable-pip-version-check install --quiet \
		--constraint constraints.txt pip --editable '.[$(EXTRAS)]'
	@rm $(PARTIAL); touch $@
