# make demo | test | lint | bench | gpu-report OUT=dir
#
# Every target makes its own virtual environment; `VENV=` (empty) uses the current Python as it is, which is what an
# offline machine wants.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
# Without an NVIDIA GPU this version is taken because an unpinned torch may bring gigabytes of CUDA packages.
TORCH_SPEC ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo "torch>=2.11" || echo "torch==2.13.0")
CONSTRAINTS ?= requirements/default.txt
JOBS ?= 2
PYTEST_ARGS ?=

PY := $(if $(VENV),$(VENV)/bin/python,$(PYTHON))
INSTALLED := $(if $(VENV),$(VENV)/.installed)

.PHONY: help install test lint format clean
help:
	@grep -E '^# make' Makefile | cut -c3-

install: $(INSTALLED)

ifneq ($(VENV),)
$(INSTALLED): pyproject.toml setup.py $(CONSTRAINTS) $(wildcard csrc/* csrc/*/*)
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet "$(TORCH_SPEC)"
	$(PY) -m pip install --quiet -c $(CONSTRAINTS) "setuptools>=77" wheel ninja
	$(PY) -m pip install --quiet -c $(CONSTRAINTS) --no-build-isolation -e ".[test,lint,triton]"
	touch $@
endif

test: $(INSTALLED)
	$(PY) -m pytest -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

lint: $(INSTALLED)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(INSTALLED)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:
	rm -rf build dist *.egg-info embedkernels/*.so

-include demo.mk gpu.mk
