# make demo: train and evaluate a small model on CPU, and draw its curves.
# make demo-segmentation: train a small UPerNet on drawings of shapes on CPU, evaluate it, and predict masks.
# make check: lint, types and the quick tests.
# make test: all tests that need no torch.
# make test-judges: installs torch, timm, transformers, OpenCLIP and OpenCV, and compares with them.
# make test-large-judges: the comparisons with timm that take minutes and 10 GB of memory.
# make test-clusters: launch/slurm.sh on Slurm, workdirs in a bucket, launch/gke.yaml and the Dockerfile; skips the tests
# of Slurm if it is not installed.
# make docs: the documentation as HTML in build/docs, without warnings.
PYTHON ?= python3
VENV = .venv
# Three workers on two cores: tests that wait for processes leave a core idle.
PYTEST = $(VENV)/bin/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

.PHONY: demo demo-segmentation check test test-judges test-large-judges test-clusters lint docs

demo: $(VENV)/runtime
	launch/cpu.sh $(VENV)/bin/python train.py --config=configs/fashion_mnist.py --workdir=runs/demo

demo-segmentation: runs/shapes/classes.txt
	launch/cpu.sh $(VENV)/bin/python train.py --config=configs/shapes.py --workdir=runs/demo_segmentation
	$(VENV)/bin/python -m convnext_jax predict 'runs/shapes/images/validation/000[0-3].jpg' \
		--weights=runs/demo_segmentation --output=runs/demo_segmentation/masks

runs/shapes/classes.txt: | $(VENV)/runtime
	$(VENV)/bin/python examples/shapes.py runs/shapes

check: lint
	$(PYTEST) --ignore tests/judges -m 'not slow and not judge and not cluster'

test: $(VENV)/development
	$(PYTEST) --ignore tests/judges -m 'not judge and not cluster'

test-judges: $(VENV)/judges
	$(PYTEST) tests/judges tests/benchmarks -m 'judge and not large'

test-large-judges: $(VENV)/judges
	$(VENV)/bin/python -m pytest tests/judges -m large

test-clusters: $(VENV)/clusters
	$(VENV)/bin/python -m pytest tests/clusters -m cluster -rs

lint: $(VENV)/development
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ty check --python $(VENV)

docs: $(VENV)/docs
	$(VENV)/bin/zensical build --strict

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/runtime: requirements.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/development: requirements.txt requirements-dev.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

$(VENV)/judges: requirements-judges.txt $(VENV)/development
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-judges.txt
	touch $@

$(VENV)/clusters: requirements-clusters.txt $(VENV)/development
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-clusters.txt
	touch $@

$(VENV)/docs: requirements-docs.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	touch $@
