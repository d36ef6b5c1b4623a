# make demo | test | lint | bench | gpu-report OUT=dir
#
# Every target makes its own virtual environment; `VENV=` (empty) uses the current Python as it is, which is what an
# offline machine wants.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
# The GPUs that are here, like 80,90. Asked once, by the targets that want to know; `GPUS=` (empty) leaves them alone.
GPUS = $(eval GPUS := $(shell $(PYTHON) csrc/tools/gpus.py))$(GPUS)
# Without a GPU one version, so that results can be repeated. Whether it comes with gigabytes of CUDA packages is up to
# pip's index; where that has builds of both kinds, TORCH_SPEC="torch==2.13.0+cpu" names the smaller.
TORCH_SPEC ?= $(if $(GPUS),torch>=2.11,torch==2.13.0)
# A torch that was named is not questioned.
NEEDS_CUDA = $(if $(filter file,$(origin TORCH_SPEC)),$(GPUS))
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
$(INSTALLED): pyproject.toml setup.py $(wildcard requirements/*.py) $(CONSTRAINTS) $(wildcard csrc/* csrc/*/*)
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet "$(TORCH_SPEC)" "setuptools>=77" wheel ninja
	@$(PY) requirements/check_torch.py "$(NEEDS_CUDA)"
	$(PY) requirements/constraints.py $(CONSTRAINTS) > $(VENV)/constraints.txt
	$(PY) -m pip install --quiet -c $(VENV)/constraints.txt --no-build-isolation -e ".[test,lint,triton]"
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

# What an environment installed in place is gone with it: without the stamps the next target installs it again.
clean:
	rm -rf build dist *.egg-info embedkernels/_extension.* $(INSTALLED) $(DEMO_INSTALLED)

-include demo.mk gpu.mk
