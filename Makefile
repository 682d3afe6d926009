# Every target sets up what it needs: a virtual environment in .venv with the tested versions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One thread per pytest worker: more would compete for the same cores.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: demo test test-nightly test-gpu lint docs bench bench-gpu clean

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# With the extras that the gallery and the documentation need.
$(VENV)/.package: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[segmentation,umap,faiss]'
	touch $@

# Without dependencies: torchattacks pins requests from 2021 and lucent kornia from 2020, foolbox and ART require
# packages that they do not import, and zennit needs nothing more.
$(VENV)/.develop: $(VENV)/.package
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test,parity,lint]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps torchattacks foolbox eagerpy adversarial-robustness-toolbox zennit torch-lucent
	touch $@

$(VENV)/.docs: $(VENV)/.package
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

# make demo MODEL=torchvision:resnet50 WEIGHTS=DEFAULT IMAGES=folder; by default the bundled network and images.
MODEL :=
WEIGHTS :=
IMAGES :=

demo: $(VENV)/.package
	# Spinning idle threads slow the others down on few cores.
	GOMP_SPINCOUNT=0 $(BIN)/phosphene demo --out gallery \
		$(if $(MODEL),--model "$(MODEL)") $(if $(WEIGHTS),--weights "$(WEIGHTS)") $(if $(IMAGES),--image "$(IMAGES)")

test: $(VENV)/.develop
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 --dist loadgroup -m "not nightly" tests

# With the long tests, and more cases of the conformance kit; a few times as long as test.
test-nightly: $(VENV)/.develop
	PHOSPHENE_PROFILE=ci $(ONE_THREAD) $(BIN)/python -m pytest -n 2 --dist loadgroup tests

# The conformance kit on CUDA, in one process.
test-gpu: $(VENV)/.develop
	$(BIN)/python -m pytest -m gpu tests

lint: $(VENV)/.develop
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	# As another program sees the package: installed, from another folder.
	cd / && $(CURDIR)/$(BIN)/mypy --strict --config-file= --cache-dir $(CURDIR)/.mypy_cache/outside $(CURDIR)/tests/typing/program.py
	$(BIN)/lint-imports

docs: $(VENV)/.docs
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html
	@echo "the documentation is at docs/_build/html/index.html"

bench: $(VENV)/.develop
	GOMP_SPINCOUNT=0 $(BIN)/python -m tests.benchmarks

bench-gpu: $(VENV)/.develop
	$(BIN)/python -m tests.benchmarks.devices cpu cuda

clean:
	rm -rf $(VENV) gallery phosphene-out docs/_build docs/methods
