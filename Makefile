# make demo: train, evaluate and see the curves. make test: everything that the project promises.
PYTHON ?= python3
VENV = .venv

.PHONY: demo test lint

demo: $(VENV)/runtime
	launch/cpu.sh $(VENV)/bin/python train.py --config=configs/fashion_mnist.py --workdir=runs/demo

test: $(VENV)/development
	$(VENV)/bin/python -m pytest -n 2

lint: $(VENV)/development
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/runtime: requirements.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/development: requirements.txt requirements-dev.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@
