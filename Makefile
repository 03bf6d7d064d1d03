# make report   build, and measure this machine: which kernels are right, how fast, how near the limit
# make test     lint and the whole test suite
# make gpu      on a GPU machine, with its own Python and torch: build, test, sanitize, measure (OUT=folder)

PYTHON ?= python3
VENV ?= .venv
OUT ?= report/gpu
REPORT ?=
WORKERS ?= 2
PY := $(VENV)/bin/python
CPP := $(shell git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' 2>/dev/null)

.PHONY: report test venv lint suite interpreter gpu gpu-build gpu-test gpu-sanitize gpu-bench clean

report:
	PYTHON=$(PYTHON) scripts/setup_venv.sh $(VENV) report rivals
	$(PY) -m trifuse report $(REPORT)

test: venv lint suite interpreter

venv:
	PYTHON=$(PYTHON) scripts/setup_venv.sh $(VENV) test report

lint:
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP)

# One process a core: most tests are one thread of Python. Threads that wait must not spin, or they take the other's core.
suite:
	OMP_WAIT_POLICY=passive $(PY) -m pytest -n $(WORKERS) --dist loadfile --durations=10

# Triton's interpreter has to be chosen before triton is imported: a process of its own.
interpreter:
	TRITON_INTERPRET=1 $(PY) -m pytest -n $(WORKERS) --dist loadfile --durations=5 tests/test_triton_interpreter*.py

gpu:
	OUT=$(OUT) PYTHON=$(PYTHON) scripts/gpu.sh
gpu-build gpu-test gpu-sanitize gpu-bench: gpu-%:
	OUT=$(OUT) PYTHON=$(PYTHON) scripts/gpu.sh $*

clean:
	rm -rf $(VENV) build report python/trifuse/lib python/trifuse/_native*.so python/*.egg-info
