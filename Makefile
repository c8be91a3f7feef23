# Targets that need the virtual environment create it: .venv, with the exact versions of constraints.txt.
# Install Python 3.11 with pip (Debian: python3 python3-pip), make and git first.

PYTHON  ?= $(firstword $(shell command -v python3.11 python3))
EXTRAS  ?= preprocess,evaluate,train,serve,dev
WORKERS ?= 2
PYTEST_ARGS ?=

VENV    := .venv
BIN     := $(VENV)/bin
READY   := $(VENV)/.ready
PARTIAL := $(VENV)/.incomplete
SOURCES := tccp preprocessing ray_jobs

# Two test processes on two cores, one thread each: they do not compete for cores, and the order of sums stays fixed.
ONE_THREAD := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENCV_FOR_THREADS_NUM=1
PYTEST     := $(ONE_THREAD) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help demo test soak serve check mlflow clean setup toy-weights ablation-weights
MAKEFLAGS += --no-print-directory

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(READY)  ## generate a talking head into a scene: out/demo.mp4, .png, .json; TRAIN=1 first trains small weights
	@$(BIN)/tccp demo --out out $(if $(TRAIN),--train)

test: $(READY)  ## run the test suite on two cores; PYTEST_ARGS=... goes to pytest
	@$(PYTEST) --durations 15 $(PYTEST_ARGS)

soak: $(READY)  ## run the long tests, about an hour; continues after an interruption; results: docs/soak/*.json
	@$(PYTEST) -q -m soak
	@$(ONE_THREAD) $(BIN)/python benchmarks/kills.py --trials 10 --out docs/soak/kills.json
	@$(ONE_THREAD) $(BIN)/python benchmarks/mutated_media.py --count 300 --out docs/soak/mutated_media.json
	@$(ONE_THREAD) $(BIN)/python benchmarks/hostile_child.py --count 10000 --out docs/soak/hostile_child.json
	@$(ONE_THREAD) $(BIN)/python benchmarks/training_kills.py --kills 10 --out docs/soak/training_kills.json
	@$(ONE_THREAD) $(BIN)/python benchmarks/storage_outages.py --out docs/soak/storage.json

serve: $(READY)  ## serve generation over HTTP with a page, at http://127.0.0.1:8000 or PORT=...; Ctrl-C ends it
	@$(BIN)/tccp serve --port $(or $(PORT),8000)

mlflow: $(READY)  ## show training runs in a browser: those recorded in the storage (TCCP_STORAGE, else ~/.tccp)
	@MLFLOW_DISABLE_TELEMETRY=true $(BIN)/mlflow ui --host 127.0.0.1 --port $(or $(PORT),5000) \
		--backend-store-uri sqlite:///$(or $(TCCP_STORAGE),$(HOME)/.tccp)/mlflow.db

check: $(READY)  ## run lint, format, types, layers and the fast tests
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy $(SOURCES)
	@$(BIN)/lint-imports
	@$(PYTEST) -q -m 'not slow and not soak' $(PYTEST_ARGS)

# The packaged weights, trained with the project's own commands. Finished parts are kept, interrupted ones continue.
# All networks train on films that are long enough for a change of listener. Stage 1 also trains on many short excerpts
# of conversations, because few pixels show whom a talker addresses and each excerpt adds a scene.
TOY     := $(or $(TCCP_STORAGE),$(HOME)/.tccp)/toy-weights
FIRST   := $(patsubst %,$(TOY)/footage/first/%/.done,$(shell seq 1001 1024) $(shell seq 1101 1148))
FOOTAGE := $(FIRST) $(patsubst %,$(TOY)/footage/more/%/.done,$(shell seq 1201 1344))
TRAIN_TOY = $(BIN)/tccp train $(1) --data $(TOY)/$(2) --storage $(TOY) --resume --weights $(TOY)/$(3)

toy-weights: $(READY)  ## train the packaged weights again, on two cores; may be stopped and started at any point
	@$(MAKE) -j $(WORKERS) $(FOOTAGE)
	@$(MAKE) -j $(WORKERS) $(TOY)/clips/index.parquet $(TOY)/first/index.parquet
	@for last in autoencoder lips landmark_sequence face_sequence; do $(MAKE) $(TOY)/weights/$$last/config.json || exit; done
	@rm -rf $(TOY)/packaged
	@$(BIN)/tccp export $(TOY)/weights $(TOY)/packaged --half
	@rm -rf tccp/toy && cp -r $(TOY)/packaged tccp/toy

# Auto-encoder and lips need only one view of each clip.
$(TOY)/weights/autoencoder/config.json $(TOY)/weights/lips/config.json &: $(TOY)/first/index.parquet
	@$(call TRAIN_TOY,autoencoder lips,first,weights) --jobs $(WORKERS) --set headbox.draws=1

$(TOY)/weights/landmark_sequence/config.json: $(TOY)/clips/index.parquet
	@$(call TRAIN_TOY,landmark_first landmark_sequence,clips,weights) --jobs $(WORKERS)

$(TOY)/weights/face_sequence/config.json: $(TOY)/first/index.parquet
	@$(call TRAIN_TOY,face_first face_sequence,first,weights) --jobs $(WORKERS)

$(TOY)/footage/%/.done: | $(READY)
	@$(ONE_THREAD) $(BIN)/tccp synth $(@D) --clips 100 --seconds $(if $(filter 10%,$(*F)),1.6,$(if $(filter 11%,$(*F)),0.8,1.6 --excerpt 0.4)) --seed $(*F)
	@touch $@

$(TOY)/clips/index.parquet: $(FOOTAGE)
	@$(BIN)/tccp preprocess $(TOY)/footage $(TOY)/clips --backend truth --min-clip-s 0.4

$(TOY)/first/index.parquet: $(FIRST)
	@$(BIN)/tccp preprocess $(TOY)/footage/first $(TOY)/first --backend truth

# Networks for some rows of the benchmark. They use the auto-encoder, lips and clips of the packaged weights. The
# one-stage networks replace both stages and train on the clips of stage 1, which include those of stage 2. The
# auto-encoder's statistics come from `first`.
ABLATIONS := one_stage/one_stage_first one_stage/one_stage_sequence context_blind/landmark_first \
             context_blind/landmark_sequence no_lip/face_first no_lip/face_sequence

ablation-weights: toy-weights  ## train the benchmark's ablations: one stage, without the scene, without lips
	@for kind in one_stage context_blind no_lip; do $(MAKE) $(TOY)/ablations/$$kind/autoencoder/config.json || exit; done
	@$(MAKE) -j $(WORKERS) $(ABLATIONS:%=$(TOY)/ablations/%/config.json)

# A sequence network trains on frames of its first-frame network.
$(TOY)/ablations/one_stage/one_stage_sequence/config.json: $(TOY)/ablations/one_stage/one_stage_first/config.json
$(TOY)/ablations/context_blind/landmark_sequence/config.json: $(TOY)/ablations/context_blind/landmark_first/config.json
$(TOY)/ablations/no_lip/face_sequence/config.json: $(TOY)/ablations/no_lip/face_first/config.json

$(TOY)/ablations/context_blind/%: SET := context=none
$(TOY)/ablations/no_lip/%: SET := lips.source=none

# The one-stage networks take lip references, so their pipeline also needs the packaged lips.
$(TOY)/ablations/one_stage/autoencoder/config.json:
	@$(BIN)/tccp export $(TOY)/weights $(TOY)/ablations/one_stage --components autoencoder lips

$(TOY)/ablations/%/config.json:
	@$(ONE_THREAD) $(call TRAIN_TOY,$(notdir $*),$(if $(filter no_lip/% %/autoencoder,$*),first,clips),ablations/$(patsubst %/,%,$(dir $*))) $(if $(SET),--set $(SET)) \
		$(if $(filter %/autoencoder,$*),--autoencoder $(TOY)/weights/autoencoder)

clean:  ## remove .venv, out and caches
	@rm -rf $(VENV) out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@find $(SOURCES) tests -name __pycache__ -type d -prune -exec rm -rf {} +

setup: $(READY)  ## create .venv only; the other targets create it when they need it

# .venv/.incomplete exists while a set-up runs. A set-up that finds it removes the incomplete .venv and starts over.
# The venv is created without pip, because Debian's venv would need one more package for it than Debian's pip does.
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
