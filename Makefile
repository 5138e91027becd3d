# From a fresh clone with Python 3.11 or later, make and git: `make demo`.

# `make PYTHON=python3.12 ...` chooses another one. It is run, not looked up: a shim may stand for one not installed.
PYTHON ?= $(shell python3.11 -c 'print("python3.11")' 2>/dev/null || echo python3)
TORCH ?= torch==2.13.0

VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check install
# Not README.md, which ruff would format too: its programs are set for reading.
SOURCES := aneuron benchmarks examples tests

.PHONY: help demo test lint bench soak clean
.DEFAULT_GOAL := help
.NOTPARALLEL:

help:
	@echo 'make demo    search the standard library with a real embedding model (a minute or two, after installation)'
	@echo 'make test    run the tests'
	@echo 'make lint    check style and types'
	@echo 'make bench   measure against hand-written loops and other packages (a quarter of an hour)'
	@echo 'make soak    serve more than the cores can take, with faults, for SECONDS (ten minutes)'
	@echo 'make clean   remove what these made, the virtual environment included'

demo: $(VENV)/.demo
	@$(RUN) examples/docsearch.py
	@echo '  Run the tests          make test'
	@echo '  See what it costs      make bench'
	@echo '  Use this environment   . $(VENV)/bin/activate'

test: $(VENV)/.test $(VENV)/.tools
	$(RUN) -m pytest --numprocesses 2

lint: $(VENV)/.lint
	$(RUN) -m ruff check $(SOURCES)
	$(RUN) -m ruff format --check $(SOURCES)
	$(RUN) -m mypy

bench: $(VENV)/.bench
	$(RUN) -m benchmarks

SECONDS ?= 600
soak: $(VENV)/.test
	$(RUN) tests/chaos/soak.py --seconds $(SECONDS)
	CHAOS_SECONDS=$(SECONDS) $(RUN) -m pytest -s tests/chaos/test_chaos.py

# torch comes first and alone: it is by far the largest, and nothing that follows may choose its version.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	@touch $@

# The tests look at the live page in a browser, and put load on servers with wrk. Where one is missing, and cannot be
# installed, its tests are skipped.
$(VENV)/.tools: $(VENV)/.torch
	@if ! { command -v chromedriver && command -v wrk; } >/dev/null && command -v apt-get >/dev/null \
		&& [ "$$(id -u)" = 0 ]; then \
		apt-get update && apt-get install --yes --no-install-recommends chromium chromium-driver wrk; fi
	@touch $@

# One stamp for each extra of pyproject.toml.
$(VENV)/.%: $(VENV)/.torch pyproject.toml
	$(PIP) --quiet --editable '.[$*]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
