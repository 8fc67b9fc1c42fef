# make demo   the explorer on the bundled model       make test   all tests
# make lint   linters, types, layers                  make bench  tables of figures
# make tour   draws the pictures of the documentation
# make zoo    the judge on planted faults
# make fuzz N=100000   broken files for every reader, N each (FUZZ='gguf npz' for some)
# make engines   the tests with the real llama.cpp, which is built for it (minutes), and MLX
#
# Needs python3 >= 3.11 with venv, and a package index. Everything is installed into .venv.

PYTHON ?= python3
VENV ?= .venv
# Where to look for torch besides the usual index: PyTorch's own index of CPU builds, say, since on
# Linux the usual one has it with CUDA libraries.
TORCH_INDEX ?=
# Broken files for each reader, of which readers (all), and for how many seconds each at most.
N ?= 10000
FUZZ ?=
FUZZ_SECONDS ?= 3600
# Passed to pytest: make test ARGS='-k diff'
ARGS ?=

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input \
	--no-compile --constraint constraints.txt
WORKERS := --numprocesses=auto --maxprocesses=4 --dist=worksteal
# Stamps: what is installed, as of which pyproject.toml and constraints.txt.
RUNTIME := $(VENV)/.runtime-installed
EVERYTHING := $(VENV)/.everything-installed
ENGINES := $(VENV)/.engines-installed

.DELETE_ON_ERROR:
.PHONY: demo test engines zoo fuzz lint format bench tour dist clean

# Without a terminal the table is printed. Exit code 1 is what the demo is there to show.
demo: $(RUNTIME)
	@if [ -t 0 ] && [ -t 1 ]; then $(BIN)/aprtui demo; else $(BIN)/aprtui demo --no-screen; fi \
		|| [ $$? -eq 1 ]

test: $(EVERYTHING)
	@$(BIN)/python -m pytest --ignore=tests/engines $(WORKERS) $(ARGS)

# Without a compiler there is nothing to test, and nothing wrong.
engines: $(EVERYTHING)
	@if command -v $(CXX) >/dev/null; then \
		$(MAKE) --no-print-directory $(ENGINES) \
			&& $(BIN)/python -m pytest $(WORKERS) tests/engines $(ARGS); \
	else \
		echo "skipped: there is no C++ compiler ($(CXX)) to build llama-cpp-python with"; \
	fi

lint: $(EVERYTHING)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(EVERYTHING)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The judge on faults that are planted for it: minutes, and a table. Part of CI.
zoo: $(EVERYTHING)
	@$(BIN)/python -m tests.zoo
	@$(BIN)/python -m tests.zoo --engines

# What is found is kept in fuzz-found, and told with the seed and the number that make it again.
fuzz: $(EVERYTHING)
	@$(BIN)/python -m tests.fuzz $(FUZZ) --inputs $(N) --seconds $(FUZZ_SECONDS) --jobs 2

bench: $(EVERYTHING)
	@failed=0; for script in tests/benchmarks/bench_*.py; do \
		$(BIN)/python $$script || failed=1; echo; done; exit $$failed

tour: $(EVERYTHING)
	@$(BIN)/python tools/record_tour.py

dist: $(EVERYTHING)
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) build dist .pytest_cache .hypothesis .mypy_cache .ruff_cache \
		.import_linter_cache snapshot_report.html
	find src tests tools -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { \
		echo "aprtui: there is no $(PYTHON) here; install Python 3.11 or newer, or name one:" \
			"make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "aprtui: $(PYTHON) is $$($(PYTHON) --version 2>&1), and 3.11 or newer is needed;" \
			"name another one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "aprtui: $(PYTHON) has no venv; on Debian and Ubuntu: apt install python3-venv" >&2; \
		exit 1; }
	@$(PYTHON) -m venv $(VENV)

$(RUNTIME): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing aprtui into $(VENV) ..."
	@$(INSTALL) --editable .
	@touch $@

$(EVERYTHING): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing aprtui with its development tools, torch and transformers into $(VENV)" \
		"(minutes, the first time) ..."
	@$(INSTALL) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --editable '.[dev]'
	@touch $(RUNTIME) $@

# Only what the tests use of it is built. MLX has no wheels for older systems: its tests are skipped.
$(ENGINES): pyproject.toml constraints.txt | $(EVERYTHING)
	@echo "building llama-cpp-python into $(VENV) (minutes, the first time) ..."
	@CMAKE_ARGS="-DLLAVA_BUILD=OFF $$CMAKE_ARGS" $(INSTALL) --editable '.[engines]'
	@$(INSTALL) 'mlx[cpu]' mlx-lm || echo "there is no MLX here"
	@touch $@
