# Each target makes or completes .venv first: what runs needs requirements.lock alone, what tests requirements-test.lock too.
# The first Python here that is one of these and can make environments.
PYTHON ?= $(shell for v in 3.11 3.12 3.13; do python$$v -c 'import ensurepip' 2>/dev/null && echo python$$v && break; done)
BIN := .venv/bin
# uv does not read pip's configuration, which may say where packages are: it installs only where pip has none.
install = @echo 'installing $(1)'; $$(command -v uv >/dev/null && test -z "$$($(BIN)/pip config list)" \
	&& echo uv pip install --python $(BIN)/python || echo $(BIN)/pip install --disable-pip-version-check) --quiet $(1)
COMPILE = $(BIN)/pip-compile --quiet --extra aws --strip-extras --annotation-style line --no-emit-index-url --no-emit-find-links
DEMO ?= demo
SOURCE ?=
DATA ?= $(DEMO)/shards
LOOK ?= look.png
need_data = test -e "$(DATA)/dataset.json" || { echo "error: there is no shard set at $(DATA): make one with 'make demo', or \
	name one with 'make $@ DATA=SHARDS'" >&2; exit 1; }

.PHONY: help install demo look gpu figures test test-fast test-long lint format lock clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: .venv/.installed ## make the environment .venv (7.3 GB); then: . .venv/bin/activate

.venv/.installed: requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11, 3.12 or 3.13 with its venv module is here: install one (Debian, \
	Ubuntu: apt install python3-venv), or name it with make PYTHON=PATH" >&2; exit 1; }
	rm -rf .venv  # Not venv --clear: where .venv is a link, that would empty what it leads to.
	$(PYTHON) -m venv .venv
	$(call install,-r requirements.lock)
	$(call install,--no-deps --editable .)
	touch $@

.venv/.test-installed: .venv/.installed requirements-test.lock
	$(call install,-r requirements-test.lock)
	touch $@

demo: .venv/.installed ## shard, train, evaluate and report on generated images, or on your own: make demo SOURCE=FOLDER DEMO=mine
	$(BIN)/python jobs/demo.py --output "$(DEMO)" $(if $(SOURCE),--source "$(SOURCE)")

look: .venv/.installed ## draw a batch as the network sees it: make look DATA=SHARDS
	@$(need_data)
	$(BIN)/python jobs/look.py --data "$(DATA)" --output "$(LOOK)"

gpu: .venv/.installed ## check the GPU's loader against the CPU's, time it, write gpu.json: make gpu DATA=SHARDS
	@$(need_data)
	$(BIN)/python jobs/benchmark.py --data "$(DATA)" --check-gpu --json gpu.json

figures: .venv/.installed ## draw the README's pictures anew, from docs/benchmarks/*.json and generated images
	$(BIN)/python -m tests.benchmarks.figures

# As many processes as cores, at most four, of a thread each. One of them starts Ray and trains.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4

test: .venv/.test-installed ## everything but test-long
	$(PYTEST) --dist loadfile

test-fast: .venv/.test-installed ## the tests without Ray and without whole networks, for while one works
	$(PYTEST) --dist worksteal -m "not long and not slow"

test-long: .venv/.test-installed ## faults and resizes in the midst of whole training runs, 16 minutes
	$(BIN)/python -m pytest -m long

lint: .venv/.test-installed ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.test-installed ## let ruff format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: .venv/.test-installed ## write both locks anew from pyproject.toml
	$(COMPILE) --output-file requirements.lock pyproject.toml
	$(COMPILE) --extra onnx --extra dev --constraint requirements.lock --output-file requirements-test.lock pyproject.toml

clean: ## remove .venv and demo
	rm -rf .venv demo
