# make demo   sets up and trains a dense and a tensor-ring ResNet side by side on real images
# make test   sets up and runs the tests
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
VENV ?= .venv
PY := $(VENV)/bin/python

.PHONY: demo test test-slow lint clean

$(VENV)/ready: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[benchmarks,test,lint]'
	touch $@

demo: $(VENV)/ready
	$(PY) benchmarks/demo.py

test: $(VENV)/ready
	$(PY) -m pytest -n 2

test-slow: $(VENV)/ready
	$(PY) -m pytest -m slow

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) runs
