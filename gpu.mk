# make gpu-report OUT=dir [PARTS=build,tests,sanitizer,embed,embedding_grad,attention,rope,host,step]
#   One GPU session in under nine minutes, with $(PYTHON) as it is where that has torch: no network, nothing installed.
#   Elsewhere in the environment of `make test`.
# make bench: the benchmarks alone, into runs/bench.

OUT ?= gpu-report
PARTS ?=

HAS_TORCH = $(eval HAS_TORCH := $(shell \
  $(PYTHON) -c 'import importlib.util as u; print("yes" if u.find_spec("torch") else "")'))$(HAS_TORCH)
REPORT_PY = $(if $(HAS_TORCH),$(PYTHON),$(or $(if $(VENV),$(PY)),$(error $(PYTHON) has no torch, and VENV= \
  forbids an environment that has: name another PYTHON, or leave VENV= out)))

.PHONY: gpu-report bench
# Whether an environment must be made is found out only when the report is asked for.
.SECONDEXPANSION:
gpu-report: $$(if $$(HAS_TORCH),,$$(INSTALLED))
	PYTHONPATH="$(CURDIR)" $(REPORT_PY) -m bench.gpu_report --out "$(OUT)" --parts "$(PARTS)"

bench: $(INSTALLED)
	PYTHONPATH="$(CURDIR)" $(PY) -m bench.gpu_report --out runs/bench --parts embed,embedding_grad,attention,rope,step
