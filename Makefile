# From a fresh clone with Python 3.11 or later, make and git: `make demo`.

# `make PYTHON=python3.12 ...` chooses another one. It is run, not looked up: a shim may stand for one not installed.
PYTHON ?= $(shell python3.11 -c 'print("python3.11")' 2>/dev/null || echo python3)
TORCH ?= torch==2.13.0
# The versions that every environment gets, so that a release of tomorrow fails no test of today; `make test CONSTRAINTS=`
# takes the newest.
CONSTRAINTS ?= constraints.txt

BUILD := hatchling editables cython setuptools

VENV := .venv
RUN := $(VENV)/bin/python
# Python compiles a module when it is first imported, and keeps that, whatever the shell says; pip would compile all of
# them, one after the other, and most of torch is never imported.
unexport PYTHONDONTWRITEBYTECODE
PIP := $(RUN) -m pip --disable-pip-version-check install --no-compile $(addprefix --constraint ,$(CONSTRAINTS))
# Not README.md and docs, which ruff would format too: their programs are set for reading.
SOURCES := aneuron benchmarks docs/*.py examples tests

.PHONY: help demo test ray lint docs bench realwork soak compiled constraints clean
.DEFAULT_GOAL := help
.NOTPARALLEL:

help:
	@echo 'make demo    search the standard library with a real embedding model (a minute or two, after installation)'
	@echo 'make test    run the tests, on the compiled core and on the same as Python'
	@echo 'make ray     run the tests of Ray Serve on a cluster of this machine, in both modes (ten minutes)'
	@echo 'make lint    check style and types, and build the docs'
	@echo 'make docs    build the docs, to be read from build/site/index.html'
	@echo 'make bench   measure against hand-written loops and other packages (some 25 minutes)'
	@echo 'make realwork   measure real weights and inputs beside other packages (some ten minutes)'
	@echo 'make soak    serve more than the cores can take, with faults, for SECONDS (ten minutes), then with engines that are killed'
	@echo 'make compiled   compile the core anew where it has changed: until then it runs as Python'
	@echo 'make constraints   write constraints.txt, the versions that all of these use, anew from the newest releases'
	@echo 'make clean   remove what these made, the virtual environment included'

demo: $(VENV)/.demo
	@$(RUN) examples/docsearch.py
	@echo '  Run the tests          make test'
	@echo '  See what it costs      make bench'
	@echo '  Use this environment   . $(VENV)/bin/activate'

# All tests on the compiled core, then those of the core as Python; all as Python where nothing could be compiled. Only the
# files that have these are read then: to import the others takes each process ten seconds.
# Two processes share the CPUs: what waits for another thread of an operation leaves its CPU to the other process.
test: export OMP_WAIT_POLICY := passive
test: $(VENV)/.test $(VENV)/.tools compiled
	$(RUN) -m pytest --numprocesses 2 --dist loadgroup
	@if $(RUN) -c 'from aneuron import _native; raise SystemExit(bool(_native.why_pure))'; then set -x; \
		ANEURON_PURE=1 $(RUN) -m pytest --numprocesses 2 --dist loadgroup -m 'core or pure' \
			$$(grep -rlE --include='test_*.py' 'mark\.(core|pure)\b' tests | sort); fi

# Ray is large, and its cluster slow to start: it has an environment of its own, which is made where it is first asked for.
# Ray's own warnings are no failures of ours. Each test has a limit; if its process hears of nothing any more, so has that.
RAY := $(VENV)/ray
ray: export RAY_USAGE_STATS_ENABLED := 0
ray: export RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S := 1
ray: export PATH := $(CURDIR)/$(RAY)/bin:$(PATH)
ray: $(RAY)/.made
	$(RAY)/bin/python aneuron/_native/build.py
	for mode in 0 1; do \
		RAY_SERVE_THROUGHPUT_OPTIMIZED=$$mode $(RAY)/bin/python -m pytest -o filterwarnings=ignore \
			-o faulthandler_timeout=300 -o faulthandler_exit_on_timeout=true tests/test_ray_serve.py; \
		failed=$$?; ray stop --force >/dev/null; [ $$failed = 0 ] || exit 1; done

RAYPIP := $(RAY)/bin/python $(wordlist 2,99,$(PIP))
$(RAY)/.made: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(RAY)
	$(RAYPIP) $(TORCH)
	$(RAYPIP) --quiet $(BUILD) numpy pytest pytest-asyncio pytest-xdist hypothesis
	ANEURON_PURE=1 $(RAYPIP) --quiet --no-build-isolation --no-deps --editable .
	$(RAYPIP) --quiet 'aneuron[ray]'
	@touch $@

lint: $(VENV)/.lint
	$(RUN) -m ruff check $(SOURCES)
	$(RUN) -m ruff format --check $(SOURCES)
	$(RUN) -m mypy
	$(MKDOCS)

docs: $(VENV)/.docs
	$(MKDOCS)
	@echo 'Read build/site/index.html'

# What mkdocs-material says of its successor, each time, is known. No network is needed, neither to build nor to read.
MKDOCS := NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --quiet --strict

bench: $(VENV)/.bench compiled
	$(RUN) -m benchmarks

# infinity asks for numpy<2 and sentence-transformers<4, of which it needs neither: it lies in a folder of its own, and
# runs on the versions that all others have.
REALWORK := $(VENV)/realwork
realwork: $(VENV)/.bench $(REALWORK) compiled
	PYTHONPATH=$(REALWORK) $(RUN) -m benchmarks.realwork

$(REALWORK): $(VENV)/.bench
	$(RUN) -m pip --disable-pip-version-check install --quiet --no-compile --no-deps --target $@ infinity_emb==0.0.78
	@touch $@

SECONDS ?= 600
soak: $(VENV)/.test compiled
	$(RUN) tests/chaos/soak.py --seconds $(SECONDS)
	$(RUN) tests/chaos/soak.py --seconds $(SECONDS) --engines 2 --kill-every 2
	CHAOS_SECONDS=$(SECONDS) $(RUN) -m pytest -s tests/chaos/test_chaos.py

# One file for all environments: they overlap, and what is measured is what the tests have seen. It holds for each Python
# and platform that we support. torch is left to TORCH, with the libraries of accelerators, which go by its version.
constraints: $(VENV)/.uv
	printf '%s\n' $(BUILD) '$(TORCH)' | $</bin/uv pip compile --no-config --quiet --universal --python-version 3.11 \
		--all-extras --upgrade --no-annotate --custom-compile-command 'make constraints' --output-file $</all.txt \
		pyproject.toml -
	grep -vE '^(torch|triton|cuda-[a-z]+|nvidia-[a-z0-9-]+)==' $</all.txt >constraints.txt

$(VENV)/.uv:
	$(PYTHON) -m venv $@
	$@/bin/python -m pip --disable-pip-version-check install --quiet uv

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

# One stamp for each extra of pyproject.toml. The package is built with what is installed: what pip fetches for a build by
# itself heeds no constraints. Nor is it compiled here, which `make demo` need not wait for.
$(VENV)/.%: $(VENV)/.torch pyproject.toml $(CONSTRAINTS)
	$(PIP) --quiet $(BUILD)
	ANEURON_PURE=1 $(PIP) --quiet --no-build-isolation --no-deps --editable .
	$(PIP) --quiet 'aneuron[$*]'
	@touch $@

# What is compiled lies in the package, beside what says how (aneuron/_native); only what changed is compiled again.
compiled: $(VENV)/.torch
	@$(RUN) -c 'import Cython, setuptools' 2>/dev/null || $(PIP) --quiet $(BUILD)
	@$(RUN) aneuron/_native/build.py

clean:
	rm -rf $(VENV) aneuron/_native/compiled build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
