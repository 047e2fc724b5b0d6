# Eight verbs, no logic: each sets up what it needs in .venv and calls one tool.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
# the CPU build of torch; a machine with a GPU sets TORCH=torch
TORCH ?= torch==2.13.0
# a file is tested by one of two processes: fixtures of a file are made once, and a machine of two cores is busy
WORKERS ?= 2
PYTEST_ARGS ?=
# real text, tasks and tables for the benchmarks
DATA ?= ../shared/data
# threads that wait must not spin: a second busy process would slow every small operation down many times
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test test-gpu bench bench-gpu lint report docs

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@

demo: $(STAMP)  ## compress, evaluate, report and run SmolLM2-135M-Instruct
	$(BIN)/lplr demo

test: $(STAMP)  ## the whole test suite
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test-gpu: $(STAMP)  ## the tests of the GPU kernels, on a machine with a GPU: TORCH=torch make test-gpu
	$(BIN)/python -m pytest tests/gpu $(PYTEST_ARGS)

bench: $(STAMP)  ## everything that eval/ measures, hours of it; STEPS="peers papers_images" picks some, FORCE=1 runs what is done again, LIST=1 shows them
	$(BIN)/python eval/bench.py $(STEPS) --data "$(DATA)" $(if $(FORCE),--force) $(if $(LIST),--list)

bench-gpu: test-gpu  ## the GPU kernels against copies and cuBLAS, after their tests
	$(BIN)/python eval/kernels/gpu_bench.py

lint: $(STAMP)  ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

report: $(STAMP)  ## the report page of the demo
	$(BIN)/lplr report lplr-demo/4bpw

docs: $(STAMP)  ## the API reference from the docstrings, in build/reference
	$(BIN)/python docs/reference.py build/reference
