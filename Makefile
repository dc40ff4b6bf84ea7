# bitpress: each target sets up what it needs. `make demo` and `make test` are the two to start with.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
THREADS := $(shell nproc)
Q ?= press

.PHONY: demo test check bench peers attack docs size format clean

NATIVE := pyproject.toml CMakeLists.txt $(wildcard native/*)

# Native code wants a C++ compiler and Python's headers: fetched where that needs no questions, and done without elsewhere.
define install
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) is not here; install Python 3.11 or newer, or set PYTHON."; exit 2; }
	@{ command -v c++ && $(PYTHON) -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")'; } >/dev/null 2>&1 \
	|| { [ "$$(id -u)" = 0 ] && apt-get install -y -q g++ python3-dev; } \
	|| echo "note: without a C++ compiler and Python's headers bitpress computes everything in torch, slower."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check $(TORCH) || $(BIN)/python -m pip install -q "torch>=2.9"
	$(BIN)/python -m pip install -q --disable-pip-version-check -e "$(1)"
	@touch $@
endef

$(VENV)/.runtime: $(NATIVE)
	$(call install,.)

$(VENV)/.dev: $(NATIVE)
	$(call install,.[dev])
	@touch $(VENV)/.runtime

demo: $(VENV)/.runtime
	$(BIN)/bitpress quantize smollm2-135m out/smollm2-135m-int4 --samples 64
	$(BIN)/bitpress run out/smollm2-135m-int4 --prompt "Why is the sky blue? Answer in two sentences." --max-tokens 60

test: $(VENV)/.dev
	$(BIN)/python -m pytest

check: $(VENV)/.dev
	$(BIN)/ruff format --check -q .
	$(BIN)/ruff check -q .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_floors.py

format: $(VENV)/.dev
	$(BIN)/ruff format -q .
	$(BIN)/ruff check -q --fix .

bench: $(VENV)/.dev
	$(BIN)/python -m pip install -q --disable-pip-version-check "matplotlib>=3.10"
	$(BIN)/python benchmarks/$(Q).py

peers: $(VENV)/.dev
	test -x .peers/llmcompressor/bin/python || $(PYTHON) -m venv .peers/llmcompressor
	.peers/llmcompressor/bin/python -m pip install -q --disable-pip-version-check $(TORCH)
	.peers/llmcompressor/bin/python -m pip install -q --disable-pip-version-check -r benchmarks/peers/llmcompressor.txt
	test -x .peers/golden/bin/python || $(PYTHON) -m venv .peers/golden
	.peers/golden/bin/python -m pip install -q --disable-pip-version-check $(TORCH)
	.peers/golden/bin/python -m pip install -q --disable-pip-version-check -r benchmarks/peers/golden.txt
	PYTHON=$(PYTHON) JOBS=$(THREADS) sh benchmarks/peers/llamacpp.sh

attack: $(VENV)/.dev
	$(BIN)/python -m pip install -q --disable-pip-version-check nanobind cmake
	$(BIN)/python -m pytest tests/attacks -k "not sanitized"
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -rs tests/attacks/test_native_attacks.py -k sanitized

docs: $(VENV)/.dev
	$(BIN)/python -m pip install -q --disable-pip-version-check "matplotlib>=3.10"
	$(BIN)/python scripts/list_formats.py
	$(BIN)/python scripts/list_methods.py
	$(BIN)/python benchmarks/press.py --render
	$(BIN)/python benchmarks/formats.py --render
	$(BIN)/python benchmarks/methods.py --render
	$(BIN)/python benchmarks/methods_speed.py --render
	$(BIN)/python benchmarks/engine.py --render

size:
	@find src -name '*.py' | xargs wc -l | sort -rn | head -15

clean:
	rm -rf out build dist
