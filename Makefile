# Everything runs from .venv, which the first target that needs it creates.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all reliability soak ray check format docs build clean

demo: .venv          ## train HalfCheetah-v5 (two to three minutes on two cores) and record its video
	$(BIN)/eggroll-rl train HalfCheetah-v5 --output runs/demo --overwrite
	-$(BIN)/eggroll-rl record runs/demo --plain --output runs/demo/HalfCheetah-v5.mp4

test: .venv          ## the default tests, under five minutes on two cores
	$(BIN)/python -m pytest -n auto --dist loadfile

test-all: .venv      ## with the slow ones
	$(BIN)/python -m pytest -m "not ray and not gpu and not reliability and not soak"

reliability: .venv   ## try every promise of docs/reliability.md and print the scoreboard, under 25 minutes
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "promise and not soak" --scoreboard=runs/reliability

soak: .venv          ## an hour and a half: a long run watched for leaks, and the long loops of kills
	$(BIN)/python -m pytest -n 2 --dist loadfile -m soak --scoreboard=runs/soak

ray: .venv           ## a Ray cluster of three nodes on this machine, about seven minutes; installs Ray
	$(BIN)/python -m pip install --quiet --disable-pip-version-check ray==2.60.0
	$(BIN)/python -m pytest -m ray

check: .venv         ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: .venv          ## the site in build/site, without network
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

build: .venv         ## wheel and sdist in dist/
	$(BIN)/python -m build --no-isolation

clean:
	rm -rf .venv build dist runs .pytest_cache .ruff_cache .mypy_cache

.venv: .venv/installed
.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@
