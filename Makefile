# `make` alone lists what there is. Everything runs in $(VENV), which is made on first use.
#   VENV=/some/path     use (and fill) that virtual environment instead of .venv, for instance one shared by several checkouts
#   PYTHON=python3.12   the interpreter that a new one is made with (3.10 or newer)
#   CMAKE_ARGS=...      handed to the build of llama-cpp-python; another value than last time builds it again

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.vram-conductor
DOCS   := $(VENV)/.vram-conductor-docs

# In a shared environment the package may be another checkout's: this one goes first.
ifneq ($(VENV),.venv)
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
endif

# The stamp holds the CMAKE_ARGS that llama-cpp-python was built with. No CMAKE_ARGS now means: keep the build there is.
BUILT_WITH := $(shell cat $(STAMP) 2>/dev/null)
ifneq ($(strip $(CMAKE_ARGS)),)
ifneq ($(strip $(CMAKE_ARGS)),$(strip $(BUILT_WITH)))
REBUILD := --no-cache-dir --force-reinstall --no-deps
.PHONY: $(STAMP)
endif
endif

.DEFAULT_GOAL := help
.PHONY: help demo test test-all check bench docs docs-serve venv clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: venv ## three agents, three models, one device: admission, swap, refusal, a crew at work
	@$(BIN)/conductor demo

test: check ## make check, then every test but the heavy ones
	@$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not slow"

test-all: check $(DOCS) ## make check, then every test
	@$(BIN)/python -m pytest $(SIDE_BY_SIDE)

# Two processes: one has everything that starts a Ray (tests/conftest.py), the other begins with the rest.
SIDE_BY_SIDE := -n 2

check: venv ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/mypy

bench: venv ## what the actor costs over bare llama.cpp, one agent and many at once, and what a ledger decision costs
	@$(BIN)/python benchmarks/overhead.py
	@$(BIN)/python benchmarks/batching.py

docs: $(DOCS) ## the documentation as a site, in build/site
	@$(BIN)/mkdocs build --strict

docs-serve: $(DOCS) ## the same on a local port, with search, made anew as files change
	@$(BIN)/mkdocs serve

# Else mkdocs-material advertises, on every build, what its authors make next.
docs docs-serve: export NO_MKDOCS_2_WARNING := 1

venv: $(STAMP) ## the virtual environment (compiles llama-cpp-python the first time: about 5 minutes)

clean: ## remove caches and build outputs, keep the virtual environment
	@rm -rf build dist out .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

$(DOCS): $(STAMP)
	@echo "Installing what the documentation is built with"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --progress-bar off -c constraints.txt -e '.[docs]'
	@touch $@

# pip is quiet so that its errors stand out; a line every 20 s says that it lives, with a terminal or without.
# `sleep` has its outputs closed: it may outlive the recipe, and a CI log must not wait for it.
$(STAMP): pyproject.toml constraints.txt conductor/__init__.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "Python 3.10 or newer is needed; '$(PYTHON)' is $$($(PYTHON) -V 2>&1). Name another: make PYTHON=python3.12 …"; exit 1; }
	@if [ -n "$(REBUILD)" ] || ! ls -d $(VENV)/lib/python3*/site-packages/llama_cpp >/dev/null 2>&1; then \
	  command -v "$${CXX:-c++}" >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || { \
	    echo "A C++ compiler is needed to build llama-cpp-python (g++ or clang++; on Debian: apt install build-essential)."; exit 1; }; \
	  command -v cmake >/dev/null || echo "cmake is not installed: the build of llama-cpp-python fetches one for itself through pip."; \
	  echo "Compiling llama-cpp-python the first time takes about 5 minutes on a few cores; pip keeps the result."; \
	fi
	@[ -x $(BIN)/pip ] || { echo "Making $(VENV) with $(PYTHON)"; $(PYTHON) -m venv $(VENV); }
	@echo "Installing into $(VENV)"
	@start=$$(date +%s); \
	( while sleep 20 >/dev/null 2>&1; do echo "  still installing after $$(($$(date +%s) - start)) s"; done ) & ticker=$$!; \
	trap 'kill $$ticker 2>/dev/null || :' EXIT; trap 'exit 130' INT TERM; \
	pip="$(BIN)/python -m pip install --quiet --disable-pip-version-check --progress-bar off -c constraints.txt"; \
	$(if $(REBUILD),$$pip $(REBUILD) llama-cpp-python &&) $$pip -e '.[dev]' && \
	echo "Installed in $$(($$(date +%s) - start)) s"
	@echo '$(or $(CMAKE_ARGS),$(BUILT_WITH))' > $@
