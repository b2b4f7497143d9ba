# Everything works from a fresh clone: each target makes .venv first when it is missing or older than the lock.
PYTHON ?= python3.11
BIN := .venv/bin
DEMO ?= demo
SOURCE ?=

.PHONY: demo test lint format lock clean

.venv/.installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

# Shards, trains, evaluates and reports on generated images, or on your own: make demo SOURCE=FOLDER
demo: .venv/.installed
	$(BIN)/python jobs/demo.py --output $(DEMO) $(if $(SOURCE),--source $(SOURCE))

test: .venv/.installed
	$(BIN)/python -m pytest

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
