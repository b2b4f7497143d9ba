# Everything works from a fresh clone: each target makes .venv first when it is missing or older than the lock.
PYTHON ?= python3.11
BIN := .venv/bin
DEMO ?= demo
SOURCE ?=
DATA ?= $(DEMO)/shards
LOOK ?= look.png

.PHONY: demo look gpu test test-fast test-long lint format lock clean

.venv/.installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

# Shards, trains, evaluates and reports on generated images, or on your own: make demo SOURCE=FOLDER
demo: .venv/.installed
	$(BIN)/python jobs/demo.py --output $(DEMO) $(if $(SOURCE),--source $(SOURCE))

# Draws a batch as the network sees it, of the demo's set or of another: make look DATA=SHARDS
look: .venv/.installed
	@test -e $(DATA)/dataset.json || { echo "error: there is no shard set at $(DATA): make one with 'make demo', or name one with" \
		"'make look DATA=SHARDS'" >&2; exit 1; }
	$(BIN)/python jobs/look.py --data $(DATA) --output $(LOOK)

# On a machine with a GPU: checks its loader against the CPU's, times loader, network and both, and writes gpu.json
gpu: .venv/.installed
	@test -e $(DATA)/dataset.json || { echo "error: there is no shard set at $(DATA): make one with 'make demo', or name one with" \
		"'make gpu DATA=SHARDS'" >&2; exit 1; }
	$(BIN)/python jobs/benchmark.py --data $(DATA) --check-gpu --json gpu.json

# As many processes as cores, at most four, of which one starts Ray and trains.
test: .venv/.installed
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

# Without Ray and without training, for while one works.
test-fast: .venv/.installed
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal -m "not long and not slow"

# Faults and resizes in the midst of whole training runs: twenty minutes more.
test-long: .venv/.installed
	$(BIN)/python -m pytest -m long

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Writes the versions that this pyproject.toml resolves to today; commit the result.
lock: .venv/.installed
	$(BIN)/pip-compile --quiet --extra dev --extra aws --strip-extras --no-emit-index-url --no-emit-find-links \
		--output-file requirements.lock pyproject.toml

clean:
	rm -rf .venv demo
