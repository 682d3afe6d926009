# Every target sets up what it needs: a virtual environment in .venv with the tested versions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Threads of their own would fight over the cores that pytest's workers share.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: demo test lint docs bench clean

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# With what the gallery and the book draw, extras too.
$(VENV)/.package: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[segmentation,umap]'
	touch $@

# torchattacks pins a requests from 2021, which it never calls, lucent a kornia from 2020, foolbox and ART ask for
# more than they import; zennit needs nothing more: hence no-deps.
$(VENV)/.develop: $(VENV)/.package
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test,parity,lint]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps torchattacks foolbox eagerpy adversarial-robustness-toolbox zennit torch-lucent
	touch $@

$(VENV)/.docs: $(VENV)/.package
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

demo: $(VENV)/.package
	# Idle threads that spin slow each other down where cores are few.
	GOMP_SPINCOUNT=0 $(BIN)/phosphene demo --out gallery

test: $(VENV)/.develop
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 --dist loadgroup tests

lint: $(VENV)/.develop
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	# As a program of somebody else's sees the package: installed, from another folder.
	cd / && $(CURDIR)/$(BIN)/mypy --strict --config-file= --cache-dir $(CURDIR)/.mypy_cache/outside $(CURDIR)/tests/typing/program.py
	$(BIN)/lint-imports

docs: $(VENV)/.docs
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html
	@echo "the book is at docs/_build/html/index.html"

bench: $(VENV)/.develop
	GOMP_SPINCOUNT=0 $(BIN)/python -m tests.benchmarks

clean:
	rm -rf $(VENV) gallery phosphene-out docs/_build docs/methods
