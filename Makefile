# `make help` lists the targets. Works with GNU make 3.81, which macOS has.
.DEFAULT_GOAL := help
# Each step uses all processors itself.
.NOTPARALLEL:
.PHONY: help setup demo test lint vendor bench clean

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
PY     := $(BIN)/python

# Without BACKEND= the engine that .venv has stays: `make test` must not undo `make setup BACKEND=cuda`.
INSTALLED := $(patsubst $(VENV)/.engine-%,%,$(firstword $(wildcard $(VENV)/.engine-*)))
BACKEND   ?= $(or $(INSTALLED),$(if $(filter Darwin,$(shell uname -s)),metal,cpu))

# build.py reads it, also where a test calls it.
export BACKEND

ENGINE := $(VENV)/.engine-$(BACKEND)
# Sources of the lane kernels: the editable install compiles them, so a change installs again.
LANES  := localmix/native/lanes
BUILD  := $(PY) vendor/llama.cpp/build.py

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-7s %s\n", $$1, $$2 }' Makefile
	@echo "Each does the set-up that it needs. A backend is chosen once and stays:"
	@echo "  make setup BACKEND=cpu|cuda|metal|vulkan"

setup: $(VENV)/.installed ## virtual environment, engine (llama.cpp) and localmix in .venv

demo: setup ## the whole road on a small Mixtral: convert, quantize, measure, chat
	PATH="$(CURDIR)/$(BIN):$$PATH" sh examples/demo.sh

test: setup vendor ## run the tests (PYTEST_ARGS="-k name" for some of them)
	$(PY) -m pytest $(PYTEST_ARGS)

lint: setup ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

vendor: $(PY) ## build llama.cpp's own tools into the user's cache, once
	@PATH="$$PATH:$(CURDIR)/$(BIN)"; \
	command -v cmake >/dev/null || $(PY) -m pip install --quiet cmake ninja || exit 1; \
	folder=`$(BUILD)` || exit 1; \
	ln -sfn "`dirname "$$folder"`" vendor/llama.cpp/build; \
	echo "llama.cpp's tools: $$folder"

bench: setup vendor ## compare speed and memory with llama.cpp's tools
	@if [ -f bench/run.py ]; then $(PY) bench/run.py $(BENCH_ARGS); \
	else echo "There is no benchmark here yet (bench/run.py)."; fi

clean: ## remove what was made in this checkout, the demo's models too (your library and cache stay)
	rm -rf $(VENV) build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache vendor/llama.cpp/build
	rm -rf $(LANES)/*.so $(LANES)/build.ninja $(LANES)/Makefile $(LANES)/CMakeFiles $(LANES)/CMakeCache.txt \
	$(LANES)/CMakeInit.txt $(LANES)/cmake_install.cmake $(LANES)/.cmake $(LANES)/.ninja_* $(LANES)/.skbuild-info.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	{ echo "localmix needs Python 3.10 or newer as $(PYTHON). Another one: make PYTHON=python3.12"; exit 1; }
	@# A venv that Debian left half made has a python but no pip: it must not look finished.
	@$(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV); \
	echo "This Python cannot make virtual environments. Debian: apt install python3-venv"; exit 1; }

# An engine of the pinned version that somebody else put here is kept, unless BACKEND= asks for one.
$(ENGINE): vendor/llama.cpp/pin.json vendor/llama.cpp/build.py | $(PY)
	@if [ "$(origin BACKEND)" = file ] && [ -z "$(INSTALLED)" ] && $(PY) -c 'import json, sys; \
	from importlib.metadata import version; pin = json.load(open("vendor/llama.cpp/pin.json")); \
	sys.exit(version(pin["package"]) != pin["version"])' 2>/dev/null; then :; else \
	wheel=`$(BUILD) --engine-wheel` && \
	$(PY) -m pip install --quiet --force-reinstall --no-deps "$$wheel" || exit 1; fi
	@rm -f $(VENV)/.engine-*
	@touch $@

$(VENV)/.installed: pyproject.toml $(LANES)/CMakeLists.txt $(wildcard $(LANES)/*.cpp $(LANES)/*.h $(LANES)/*.def) $(ENGINE)
	$(PY) -m pip install --quiet --editable '.[dev]'
	@touch $@
