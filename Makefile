# The README's commands. Each target that needs Python makes .venv first, and again when what it was made from changes.
PYTHON ?= python3

CONCEPT ?= teddy_bear
# More flags for examples/demo.py, such as DEMO_FLAGS="--max_train_steps 10 --quick" for a short run.
DEMO_FLAGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LOWEST := .venv-lowest

.DEFAULT_GOAL := test
.PHONY: demo test test-lowest lint format clean

# torch comes first, so that no later step can choose another one.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[train,dev]"
	touch $@

demo: $(STAMP)
	TRANSFORMERS_VERBOSITY=error $(BIN)/python examples/demo.py --concept $(CONCEPT) --output_dir demo $(DEMO_FLAGS)

test: lint
	$(BIN)/python -m pytest -q

# The tests with the lowest versions that pyproject.toml admits, in an environment of their own.
# Only later versions of torch let a device be pretended.
test-lowest: $(LOWEST)/.installed
	$(LOWEST)/bin/python -m pytest -q --ignore tests/test_pretended.py

$(LOWEST)/.installed: pyproject.toml
	$(PYTHON) -m venv --clear $(LOWEST)
	$(LOWEST)/bin/python -m pip install -q uv
	$(LOWEST)/bin/uv pip install -q --python $(LOWEST) --resolution lowest-direct -e ".[train,dev]"
	touch $@

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Everything that the other targets made, but for their environments.
clean:
	rm -rf demo outputs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path "./$(VENV)*" -prune -o -type d -name __pycache__ -exec rm -rf {} +
