# What one does with pybhyve.  `make` lists it.

PYTHON ?= python3
GUEST ?=
CPUS ?= 2
MEMORY ?= 2G
DISK ?= build/debian12.img
NET ?= slirp,open=true
PYTEST_ARGS ?=
FUZZ_SECONDS ?= 600
FUZZ_SEED ?= 1

VENV := .venv
BIN := $(VENV)/bin
CARGO := cargo
# pyo3 must see the interpreter that the package is installed for.
export PYO3_PYTHON := $(CURDIR)/$(BIN)/python
export PIP_DISABLE_PIP_VERSION_CHECK := 1

RUST_SOURCES := $(shell find rust -path rust/target -prune -o -type f -print)

.DEFAULT_GOAL := help
.PHONY: help setup run test check lint rust-check man firmware bench fuzz-cpu fuzz-guest clean
.DELETE_ON_ERROR:

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "Variables: CPUS=$(CPUS) MEMORY=$(MEMORY) NET=$(NET) DISK=$(DISK)"
	@echo "           GUEST=$(GUEST) PYTEST_ARGS=$(PYTEST_ARGS)"
	@echo "           FUZZ_SECONDS=$(FUZZ_SECONDS) FUZZ_SEED=$(FUZZ_SEED)"

setup: $(VENV)/.installed ## Build and install into .venv: bhyve, bhyvectl, bhyveload

run: setup ## Boot Debian from a disk on this terminal (GUEST=: a kernel to a shell)
	@# 0: the guest rebooted; up to 3: another end of the guest's; beyond: failures.
	@status=0; while [ $$status -eq 0 ]; do \
		$(BIN)/python -m tools.boot --cpus $(CPUS) --memory $(MEMORY) \
			--disk $(DISK) --net $(NET) $(GUEST); \
		status=$$?; done; [ $$status -le 3 ] || exit $$status

test: check firmware ## Everything: check, differential tests, unit tests, real guests
	@$(MAKE) --no-print-directory fuzz-guest FUZZ_SECONDS=20
	@echo "== pytest"
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

check: lint rust-check ## Formatting, lint, types, layers, and the Rust tests

lint: $(VENV)/.developed
	@echo "== ruff format"; $(BIN)/ruff format --check
	@echo "== ruff"; $(BIN)/ruff check
	@echo "== mypy"; $(BIN)/mypy
	@echo "== stubtest"; $(BIN)/stubtest pybhyve._vmm
	@echo "== import-linter"; $(BIN)/lint-imports

rust-check: $(VENV)/.developed
	@echo "== rustfmt"; cd rust && $(CARGO) fmt --check
	@echo "== clippy"; cd rust && $(CARGO) clippy --workspace --all-targets -- -D warnings
	@echo "== cargo test"; cd rust && $(CARGO) test -p vmm -p difftest

man: $(VENV)/.developed ## Rewrite what the manual pages have from declarations
	@$(BIN)/python -m tools.manpages

firmware: $(VENV)/bin/python ## Build UEFI firmware for bhyve, fetch OVMF and SeaBIOS
	@$(BIN)/python -m tools.firmware

bench: $(VENV)/.developed ## Boot, instructions, disk, network beside QEMU's TCG; exits
	@$(BIN)/python -m benchmarks.mips
	@$(BIN)/python -m benchmarks.boot
	@$(BIN)/python -m benchmarks.exits
	@$(BIN)/python -m benchmarks.disk
	@$(BIN)/python -m benchmarks.net

fuzz-cpu: ## Random instructions against this processor, for FUZZ_SECONDS
	@echo "== fuzz-cpu, $(FUZZ_SECONDS) s"
	@cd rust && $(CARGO) run --release -p difftest --bin fuzz-cpu -- \
		$(FUZZ_SECONDS) $(FUZZ_SEED)

fuzz-guest: ## Random bytes in each mode, for FUZZ_SECONDS: vmm neither fails nor hangs
	@echo "== fuzz-guest, $(FUZZ_SECONDS) s"
	@cd rust && $(CARGO) run --release -p difftest --bin fuzz-guest -- \
		$(FUZZ_SECONDS) $(FUZZ_SEED)

clean: ## Remove what was built (fetched packages stay in the user's cache)
	rm -rf $(VENV) build dist rust/target src/pybhyve/*.so
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is not Python 3.11 or newer: make PYTHON=..." >&2; exit 1; }
	@command -v $(CARGO) > /dev/null || \
		{ echo "no cargo here: install a Rust toolchain, 1.88 or newer" >&2; exit 1; }
	@echo "== creating $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "no venv module here: apt-get install python3-venv" >&2; exit 1; }

$(VENV)/.maturin: $(VENV)/bin/python pyproject.toml
	@echo "== installing the build tools"
	@$(BIN)/pip install -q --upgrade 'pip>=25.1'
	@$(BIN)/pip install -q --group build
	@touch $@

$(VENV)/.installed: $(VENV)/.maturin $(RUST_SOURCES)
	@echo "== building and installing pybhyve (the first build takes minutes)"
	@VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/maturin develop --release
	@touch $@

$(VENV)/.developed: $(VENV)/.installed pyproject.toml
	@echo "== installing the development tools"
	@$(BIN)/pip install -q --group tests
	@touch $@
