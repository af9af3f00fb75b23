# Each target does its own set-up; only Python (>= 3.11) and make are needed.
PYTHON ?= python3
VENV ?= .venv
# The version of PyTorch that `make constraints` pins.
TORCH ?= 2.13.0
BIN := $(VENV)/bin
# A file of tests stays in one process, so that what it compiles is compiled once. Files run in the order of their names:
# xdist would put those with few tests last, and some of them take a minute.
PYTEST_FLAGS ?= --numprocesses=auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder

.PHONY: setup quickstart test lint format constraints clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

quickstart: setup
	$(BIN)/kvjax quickstart --output_dir=quickstart

test: setup
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Pins all dependencies anew, resolved in an empty environment. pip downloads what it has to look into.
constraints:
	rm -rf build/resolver && $(PYTHON) -m venv build/resolver
	build/resolver/bin/python make_constraints.py $(TORCH) > build/constraints.txt
	mv build/constraints.txt constraints.txt

clean:
	rm -rf $(VENV) build dist *.egg-info
