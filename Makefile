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

.PHONY: venv check test unit demo bench chaos clean

venv: $(VENV)/.installed

# Modules are compiled here once, or else by each of an engine's three processes, whenever one starts: 40 seconds.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PYTHON) -m venv $(VENV)/tools
	$(VENV)/tools/bin/pip install --quiet uv
	$(UV) pip install --quiet --compile-bytecode --python $(RUN)/python $(TORCH) $(CONSTRAINTS) --editable '.[$(EXTRAS)]'
	touch $@

check: venv
	$(RUN)/ruff check
	$(RUN)/ruff format --check
	$(RUN)/mypy

unit: venv
	$(RUN)/pytest tests/unit

test: venv
	$(RUN)/pytest

demo: venv
	$(RUN)/python -m tests.demo

# QUICK=1 ends in less than ten minutes; GPU=1 runs on one NVIDIA GPU; ONLY="short prefix" names workloads.
bench: venv
	$(RUN)/python -m tests.benchmarks $(if $(QUICK),--quick) $(if $(GPU),--gpu) $(if $(ONLY),--only $(ONLY))

# QUICK=1 has each fault once; ONLY="replica_killed driver_killed" names faults. Needs root, to mount small disks.
chaos: venv
	$(RUN)/python -m tests.chaos $(if $(QUICK),--quick) $(if $(ONLY),--only $(ONLY))

clean:
	rm -rf $(VENV) build dist
