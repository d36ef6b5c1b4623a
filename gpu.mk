# make gpu-report OUT=dir [PARTS=build,tests,sanitizer,embed,embedding_grad,attention,step]
#   One GPU session in under nine minutes, with $(PYTHON) as it is: no network, nothing installed.
# make bench: the benchmarks alone, into runs/bench.

OUT ?= gpu-report
PARTS ?=

.PHONY: gpu-report bench
gpu-report:
	PYTHONPATH="$(CURDIR)" $(PYTHON) -m bench.gpu_report --out "$(OUT)" --parts "$(PARTS)"

bench: $(INSTALLED)
	PYTHONPATH="$(CURDIR)" $(PY) -m bench.gpu_report --out runs/bench --parts embed,embedding_grad,attention,step
