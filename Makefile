# Everything runs in .venv, which `make` builds with uv on first use. PIP_FIND_LINKS, where pip is given a folder of
# wheels, is handed on to uv.
SHELL := /bin/bash
PYTHON ?= python3.11
# GPU=1 wants vLLM's CUDA build instead of the one for CPUs: an environment of its own, without the constraints, which
# name the CPU build's companions.
VENV := $(if $(GPU),.venv-gpu,.venv)
EXTRAS := dev,$(if $(GPU),vllm,cpu)
CONSTRAINTS := $(if $(GPU),,--constraint constraints.txt)
RUN := $(VENV)/bin
UV := UV_FIND_LINKS="$(PIP_FIND_LINKS)" $(VENV)/tools/bin/uv
# CPU builds of torch come from the find-links folder if there is one, else from PyTorch's own index.
TORCH := $(if $(PIP_FIND_LINKS)$(GPU),,--torch-backend=cpu)

# The supported releases of Airflow. Each gets what was newest on the day after its release, and a Python of its own where
# pyenv has it; else it runs on PYTHON.
AIRFLOWS := 3.1.8 3.2.2 3.3.2
DAY_3.1.8 := 2026-03-12
DAY_3.2.2 := 2026-05-30
DAY_3.3.2 := 2026-09-18
PYENV := $(HOME)/.pyenv/versions
PYTHON_3.1.8 := $(PYTHON)
PYTHON_3.2.2 := $(firstword $(wildcard $(PYENV)/3.12.*/bin/python) $(PYTHON))
PYTHON_3.3.2 := $(firstword $(wildcard $(PYENV)/3.13.*/bin/python) $(PYTHON))
COMPAT := $(addprefix compat-,$(AIRFLOWS))

.PHONY: venv check test unit compat $(COMPAT) docs demo bench chaos clean

venv: $(VENV)/.installed

# Modules are compiled here once, or else by each of an engine's three processes, whenever one starts: 40 seconds.
$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/tools/bin/uv
	$(PYTHON) -m venv $(VENV)
	$(UV) pip install --quiet --compile-bytecode --python $(RUN)/python $(TORCH) $(CONSTRAINTS) --editable '.[$(EXTRAS)]'
	touch $@

$(VENV)/tools/bin/uv:
	$(PYTHON) -m venv $(VENV)/tools
	$(VENV)/tools/bin/pip install --quiet uv

.venv-compat-%/.installed: pyproject.toml | $(VENV)/tools/bin/uv
	$(UV) venv --quiet --clear --no-project --python $(PYTHON_$*) .venv-compat-$*
	$(UV) pip install --quiet --compile-bytecode --exclude-newer $(DAY_$*) --python .venv-compat-$*/bin/python \
		--editable '.[test]' apache-airflow==$*
	touch $@

check: venv
	$(RUN)/ruff check
	$(RUN)/ruff format --check
	$(RUN)/mypy

unit: venv
	$(RUN)/pytest tests/unit

# Integration tests that need no engine of others: with the system tests, which take as long as the rest then.
APART := $(patsubst %,tests/integration/test_%.py,benchmarks gpus local routing)

# Three sessions at a time: one alone leaves the cores idle for a third of its time, in which it waits for Ray and
# Airflow. Each has clusters, ports and folders of its own; the unit tests take what the others leave.
test: venv
	@mkdir -p build; nice -n 19 $(RUN)/pytest -p no:cacheprovider tests/unit > build/unit-tests.log 2>&1 & unit=$$!; \
	$(RUN)/pytest -p no:cacheprovider $(APART) tests/contract tests/system > build/system-tests.log 2>&1 & system=$$!; \
	$(RUN)/pytest tests/integration $(addprefix --ignore=,$(APART)); others=$$?; \
	wait $$system; systems=$$?; wait $$unit; units=$$?; \
	cat build/unit-tests.log build/system-tests.log; exit $$((others || systems || units))

# What a worker runs, without Ray, on each supported Airflow; compat-3.1.8 is the oldest alone.
compat: $(COMPAT)

$(COMPAT): compat-%: .venv-compat-%/.installed
	.venv-compat-$*/bin/python -W ignore -c 'import sys, airflow; print("Airflow", airflow.__version__, "on Python", sys.version)'
	.venv-compat-$*/bin/pytest tests/unit tests/contract

# The site, in build/docs. Its tools have an environment of their own; a warning is an error.
docs: .venv-docs/.installed
	rm -rf build/docs
	.venv-docs/bin/sphinx-build --quiet --fail-on-warning --keep-going --fresh-env docs build/docs
	@echo "open build/docs/index.html"

.venv-docs/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/pip install --quiet uv
	.venv-docs/bin/uv pip install --quiet --python .venv-docs/bin/python --group docs
	touch $@

demo: venv
	$(RUN)/python -m tests.demo

# QUICK=1 ends in less than ten minutes; GPU=1 runs on one NVIDIA GPU; ONLY="short prefix" names workloads.
bench: venv
	$(RUN)/python -m tests.benchmarks $(if $(QUICK),--quick) $(if $(GPU),--gpu) $(if $(ONLY),--only $(ONLY))

# QUICK=1 has each fault once; ONLY="replica_killed driver_killed" names faults. Needs root, to mount small disks.
chaos: venv
	$(RUN)/python -m tests.chaos $(if $(QUICK),--quick) $(if $(ONLY),--only $(ONLY))

clean:
	rm -rf $(VENV) .venv-compat-* .venv-docs build dist
