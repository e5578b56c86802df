# demo · test · lint · docs · bench · bench-quick · mutants · torture · package: each makes .venv first if it is missing. A first run downloads
# PyTorch; later ones start at once.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin

# the exact versions to install: with an NVIDIA GPU in sight the CUDA build of torch, else the CPU build
KIND := $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
# written after the last step of an installation, so that an interrupted one is never taken for whole
READY := .venv/.ready-$(KIND)
# tests run side by side, each on one core
WORKERS ?= $(shell cores=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); echo $$(( cores < 8 ? cores : 8 )))

.PHONY: demo test lint docs bench bench-quick mutants torture package test-newest-triton venv
.NOTPARALLEL:

demo: $(READY)
	@$(BIN)/stm demo $(ARGS)

test: $(READY)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --benchmark-disable tests $(ARGS)

lint: $(READY)
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet . || { $(BIN)/ruff format --check .; exit 1; }
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/mypy --no-error-summary

# the pages of docs/ and the API from the docstrings, into site/
docs: $(READY)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --clean

bench: $(READY)
	@$(BIN)/python -m pytest -q --benchmark-quiet --benchmark-json=bench/results/suite.json bench/suite $(ARGS)

# breaks the code in one place after the other; fails where no test notices
mutants: $(READY)
	@$(BIN)/python tests/mutants.py $(ARGS)

# kills runs at random moments and resumes them; fails where the results differ from those of whole runs
torture: $(READY)
	@$(BIN)/python tests/torture.py $(ARGS)

bench-quick: $(READY)
	@$(BIN)/python -m pytest -q --benchmark-quiet --quick bench/suite $(ARGS)

# the kernels in the interpreter of the newest Triton; everything else is that of .venv
NEWEST := .venv-newest-triton
SITE := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'

test-newest-triton: $(NEWEST)/.ready
	@OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest -q -n $(WORKERS) tests/kernels -k triton --ignore tests/kernels/test_aot.py $(ARGS)

$(NEWEST)/.ready: $(READY) constraints/newest-triton.txt
	@$(BIN)/python -m venv --without-pip --clear $(NEWEST)
	@$(BIN)/python $(SITE) > "$$($(NEWEST)/bin/python $(SITE))/shared.pth"
	@$(BIN)/python -m pip --python $(NEWEST)/bin/python install -q --no-deps --ignore-installed -r constraints/newest-triton.txt
	@touch $@

package: $(READY)
	@.ci/package dist

venv: $(READY)

$(READY): setup.py $(wildcard constraints/*.txt)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null \
		|| { echo "$(PYTHON) is $$($(PYTHON) --version 2>&1 || true): Python 3.10 or newer is needed, set PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "Making .venv with $$($(PYTHON) --version): a few minutes the first time"
	@[ -n "$(wildcard .venv/.ready-*)" ] || $(PYTHON) -m venv --clear .venv
	@rm -f .venv/.ready-*
	@set -o pipefail; constraints=constraints/$(KIND).txt; \
	if [ $(KIND) = cpu ] && [ "$$(uname -s)" = Linux ] && \
		! $(BIN)/python -m pip install -q --dry-run --no-deps "$$(grep -h '^torch==' $$constraints)+cpu" >/dev/null 2>&1; then \
		echo "   pip finds no CPU build of torch: installing the larger CUDA build, which runs on the CPU too"; \
		constraints=constraints/cuda.txt; \
	fi; \
	$(BIN)/python -m pip install -c $$constraints -e '.[dev]' 2>&1 | tee .venv/install.log \
		| awk '/^(Collecting|Processing|Building|Installing)/ { print "   " substr($$0, 1, 110); fflush() }' \
		|| { grep -v '^WARNING' .venv/install.log | tail -n 20 >&2; exit 1; }
	@touch $@
