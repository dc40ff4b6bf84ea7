# bitpress: each target sets up what it needs. `make demo` and `make test` are the two to start with.
PYTHON ?= python3
VENV := .venv
NEWEST := .venv-newest
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check
TORCH ?= torch==2.13.0
THREADS := $(shell nproc)
Q ?= press

.PHONY: demo test test-release test-newest lock check bench peers attack attack-slice docs size format clean

NATIVE := pyproject.toml CMakeLists.txt $(wildcard native/* native/engine/*)

# Native code wants a C++ compiler and Python's headers: fetched where that needs no questions, and done without elsewhere.
# Every package is the locked one, checked by its hash; torch alone is installed apart, in the build that fits the machine.
define install
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) is not here; install Python 3.11 or newer, or set PYTHON."; exit 2; }
	@{ command -v c++ && $(PYTHON) -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")'; } >/dev/null 2>&1 \
	|| { [ "$$(id -u)" = 0 ] && apt-get install -y -q g++ python3-dev; } \
	|| echo "note: without a C++ compiler and Python's headers bitpress computes everything in torch, slower."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --no-deps --require-hashes -r requirements/$(1).lock
	$(PIP) $(TORCH) || $(PIP) "torch>=2.9"
	$(PIP) --no-deps --no-build-isolation -e .
	@touch $@
endef

$(VENV)/.runtime: $(NATIVE) requirements/runtime.lock
	$(call install,runtime)

$(VENV)/.dev: $(NATIVE) requirements/dev.lock
	$(call install,dev)
	@touch $(VENV)/.runtime

demo: $(VENV)/.runtime
	$(BIN)/bitpress quantize smollm2-135m out/smollm2-135m-int4 --samples 64
	$(BIN)/bitpress run out/smollm2-135m-int4 --prompt "Why is the sky blue? Answer in two sentences." --max-tokens 60

# The tests of every day: one process a core, and of the laws a choice that tries every row of a table with every kind of other row.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(THREADS) --dist worksteal

# Every combination of every law with more examples, and the arrays of every call checked (tests/array_checks.py), for a release.
test-release: $(VENV)/.dev
	BITPRESS_TESTS=release OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(THREADS) -m ""

# The same tests with the newest release of every package that pyproject.toml allows. What a release deprecates is listed, not an error.
test-newest:
	rm -rf $(NEWEST)
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install -q --disable-pip-version-check $(TORCH)
	$(NEWEST)/bin/python -m pip install -q --disable-pip-version-check ".[dev]"
	$(NEWEST)/bin/python scripts/list_newer.py requirements/dev.lock
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest -n $(THREADS) -W default::FutureWarning -W default::DeprecationWarning \
	-W default::PendingDeprecationWarning

# Renew requirements/*.lock: the newest versions that pyproject.toml allows, with their hashes.
lock: $(VENV)/.dev
	$(PIP) "uv>=0.9"
	$(BIN)/python scripts/lock.py

check: $(VENV)/.dev
	$(BIN)/ruff format --check -q .
	$(BIN)/ruff check -q .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_floors.py tests/test_budgets.py

format: $(VENV)/.dev
	$(BIN)/ruff format -q .
	$(BIN)/ruff check -q --fix .

bench: $(VENV)/.dev
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
	$(BIN)/python -m pytest tests/attacks -k "not sanitized"
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -rs -m "" tests/attacks/test_native_attacks.py -k sanitized

# Of the attacks what continuous integration has time for; `make test` runs all that need no sanitized library.
attack-slice: $(VENV)/.dev
	$(BIN)/python -m pytest tests/attacks/test_foreign_attacks.py
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -rs -m "" tests/attacks/test_native_attacks.py -k "sanitized and sampling"

docs: $(VENV)/.dev
	$(BIN)/python scripts/list_formats.py
	$(BIN)/python scripts/list_methods.py
	$(BIN)/python scripts/list_native.py
	$(BIN)/python scripts/list_exchange.py
	$(BIN)/python scripts/list_report.py
	$(BIN)/python scripts/list_architectures.py
	$(BIN)/python scripts/list_rotations.py
	$(BIN)/python benchmarks/press.py --render
	$(BIN)/python benchmarks/formats.py --render
	$(BIN)/python benchmarks/methods.py --render
	$(BIN)/python benchmarks/methods_speed.py --render
	$(BIN)/python benchmarks/engine.py --render
	$(BIN)/python benchmarks/schemes.py --render
	$(BIN)/python benchmarks/learning.py --render
	$(BIN)/python benchmarks/integers.py --render
	$(BIN)/python benchmarks/exchange.py --render
	$(BIN)/python benchmarks/greedy.py --render
	$(BIN)/python benchmarks/encoder.py --render

size:
	@find src -name '*.py' | xargs wc -l | sort -rn | head -15

clean:
	rm -rf out build dist
