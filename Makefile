# SPDX-License-Identifier: Apache-2.0
# The one door for chores. `make demo` and `make test` do everything on a fresh machine.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
VENV := .venv

.PHONY: help setup dev kernels demo check test bench soak format clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 16

setup: ## system packages, virtual environment, .venv/bin/rootvisor (quick when nothing changed)
	@scripts/setup

dev: ## setup, and the tools for check and test
	@scripts/setup --dev

kernels: setup ## both kernels, fetched and built into the cache (once: minutes)
	$(VENV)/bin/rootvisor kernel build stock
	$(VENV)/bin/rootvisor kernel build mshv

demo: setup ## boot the root partition and show the evidence
	$(VENV)/bin/rootvisor demo

check: dev ## lint, formatting, types, layers
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/pytest -q tests/unit/test_layers.py

test: check kernels ## check, then every test
	$(VENV)/bin/pytest

bench: setup ## side by side with QEMU
	$(VENV)/bin/rootvisor bench

soak: dev kernels ## the long forms: 30 boots in a row (BOOTS=N), fuzz, guests under load, killed VMMs
	scripts/soak $(BOOTS)
	ROOTVISOR_X86_CASES=10000 ROOTVISOR_X86_FUZZ=2000000 $(VENV)/bin/pytest --timeout 3600 tests/unit/x86
	ROOTVISOR_FUZZ=100000 $(VENV)/bin/pytest --timeout 3600 tests/unit/virtio/test_fuzz.py
	ROOTVISOR_API_CALLS=100000 $(VENV)/bin/pytest --timeout 3600 tests/unit/vmm/test_api_fuzz.py
	ROOTVISOR_FUZZ_CALLS=150000 ROOTVISOR_PARTITION_CALLS=200000 ROOTVISOR_GUEST_ACCESSES=1000000 ROOTVISOR_BULK_MB=100 \
	ROOTVISOR_KVM_TESTS="tests/kvm/test_fuzz.py tests/kvm/test_guest_fuzz.py tests/kvm/test_partition_fuzz.py \
	    tests/kvm/test_root_partition.py" \
	    $(VENV)/bin/pytest tests/integration/test_kvm_suite.py
	ROOTVISOR_GUEST_EXPIRIES=1000000 ROOTVISOR_GUEST_HAMMER=300 \
	ROOTVISOR_KVM_TESTS="tests/kvm/test_guest_timers.py tests/kvm/test_guest_time.py" \
	    $(VENV)/bin/pytest tests/integration/test_kvm_suite.py
	ROOTVISOR_SOAK=1 ROOTVISOR_GUEST_LOAD=1800 ROOTVISOR_GUEST_LOAD_HIDDEN=180 \
	ROOTVISOR_KVM_TESTS=tests/kvm/test_guest_partition.py $(VENV)/bin/pytest tests/integration/test_kvm_suite.py
	scripts/kill-vmms
	ROOTVISOR_HARDWARE_LOAD_S=600 $(VENV)/bin/pytest --timeout 14400 tests/integration/test_debian_root.py
	ROOTVISOR_HARDWARE_KILLS=50 $(VENV)/bin/pytest --timeout 14400 tests/integration/test_hardware_suite.py
	ROOTVISOR_SOAK=1 ROOTVISOR_KVM_TESTS=tests/kvm/test_guest.py $(VENV)/bin/pytest tests/integration/test_kvm_suite.py
	ROOTVISOR_SOAK=1 $(VENV)/bin/pytest tests/peers
	ROOTVISOR_PEER_MACHINES=microvm ROOTVISOR_PEER_KERNELS=mshv ROOTVISOR_PEER_VPS=1 ROOTVISOR_PEER_BOOTS=50 \
	    $(VENV)/bin/pytest tests/peers/test_qemu.py
	ROOTVISOR_PEER_MACHINES=microvm ROOTVISOR_PEER_KERNELS=mshv ROOTVISOR_PEER_VPS=1 ROOTVISOR_PEER_BOOTS=16 \
	ROOTVISOR_PEER_PARALLEL=8 $(VENV)/bin/pytest tests/peers/test_qemu.py
	ROOTVISOR_SOAK=1 ROOTVISOR_VMM_REBOOTS=100 ROOTVISOR_VMM_CYCLES=20 ROOTVISOR_VMM_KILLS=50 ROOTVISOR_VMM_LOAD_S=600 \
	ROOTVISOR_VMM_LIMIT=14400 \
	$(VENV)/bin/pytest tests/vmm

format: dev ## put the sources into the project's format
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

clean: ## remove what set-up and the tests left in the tree (not the cache of kernels)
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
	find src tests -name __pycache__ -prune -exec rm -rf {} +
