# The README's commands. Each target that needs Python makes .venv first, and again when what it was made from changes.
PYTHON ?= python3

CONCEPT ?= teddy_bear
# More flags for examples/demo.py, such as DEMO_FLAGS="--max_train_steps 10 --quick" for a short run.
DEMO_FLAGS ?=
# Processes that share the tests.
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
LOWEST := .venv-lowest
FRESH := .venv-wheel

# One thread for each process, so that the processes do not compete for cores.
PYTEST = OMP_NUM_THREADS=1 $(1)/python -m pytest -q -n $(WORKERS) --dist worksteal

.DEFAULT_GOAL := test
.PHONY: demo test test-lowest fuzz kills wheel lint format clean

# What a user installs. torch comes first, so that no later step can choose another one.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py --concept $(CONCEPT) --output_dir demo $(DEMO_FLAGS)

test: lint
	$(call PYTEST,$(BIN))

# The tests with the lowest versions that pyproject.toml admits, in an environment of their own.
# Only later versions of torch let a device be pretended.
test-lowest: $(LOWEST)/.installed
	$(call PYTEST,$(LOWEST)/bin) --ignore tests/test_pretended.py

$(LOWEST)/.installed: pyproject.toml
	$(PYTHON) -m venv --clear $(LOWEST)
	$(LOWEST)/bin/python -m pip install -q uv
	$(LOWEST)/bin/uv pip install -q --python $(LOWEST) --resolution lowest-direct -e ".[dev]"
	touch $@

# Damaged concept files, headers and training images; `make fuzz CASES=100000` for more.
fuzz: CASES = 2000
fuzz: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/fuzz.py --cases $(CASES)

# Trainings that are killed at random moments, and resumed to the same bytes; `make kills CASES=1000` for more.
kills: CASES = 100
kills: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python tests/kills.py --cases $(CASES)

# The wheel as a user gets it. Isolated mode keeps this checkout out of the import path.
wheel:
	rm -rf dist
	$(PYTHON) -m venv --clear $(FRESH)
	$(FRESH)/bin/python -m pip wheel -q --no-deps -w dist .
	$(FRESH)/bin/python -m pip install -q -c constraints.txt torch
	$(FRESH)/bin/python -m pip install -q -c constraints.txt dist/*.whl
	$(FRESH)/bin/python -I -c "from diffusers_perfusion import PerfusionConcept, PerfusionPipeline, PerfusionXLPipeline"
	$(FRESH)/bin/perfusion --help
	$(FRESH)/bin/perfusion info examples/hub/my-bear

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Everything that the other targets made, except their environments.
clean:
	rm -rf demo outputs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path "./$(VENV)*" -prune -o -type d -name __pycache__ -exec rm -rf {} +
