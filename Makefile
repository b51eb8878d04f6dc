# make demo   sets up and trains a dense and a tensor-ring ResNet side by side on real images
# make test   sets up and runs the tests
# make docs   builds the site in docs/_build/html, tutorials run, with warnings as errors
# make test-docs   opens that site in headless Chromium: links, search, formulas, pictures
# make test-base   the README's code, the doctests and fits with the wheel alone in a fresh venv, without extras
# make test-latest   the tests, and those on timm's models, with the torch of constraints-latest.txt; 6 GB in a venv of its own
# make results-smoke   the pipeline of the results, training to tables, in two minutes on small images
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
VENV ?= .venv
EXTRAS ?= benchmarks,test,lint
PY := $(VENV)/bin/python
BASE := .venv-base

.PHONY: demo test docs test-docs test-slow test-base test-latest results-smoke lint clean

$(VENV)/ready: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[$(EXTRAS)]'
	touch $@

demo: $(VENV)/ready
	$(PY) benchmarks/training/demo.py

test: $(VENV)/ready
	$(PY) -m pytest -n 2 --dist worksteal

$(VENV)/docs-ready: $(VENV)/ready
	$(PY) -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[docs]'
	touch $@

docs: $(VENV)/docs-ready
	$(PY) benchmarks/report/tables.py --check
	OMP_NUM_THREADS=1 $(PY) -m sphinx -E -a -b html -W --keep-going -q docs docs/_build/html

test-docs: docs
	$(PY) -m pytest -m site tests/site

test-slow: $(VENV)/ready
	$(PY) -m pytest -m slow

test-base:
	$(PYTHON) -m venv --clear $(BASE)
	$(BASE)/bin/python -m pip wheel --quiet --disable-pip-version-check --no-deps -w $(BASE)/wheel .
	$(BASE)/bin/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) $(BASE)/wheel/*.whl
	$(BASE)/bin/python -I tests/base_install.py README.md

test-latest:
	$(MAKE) test VENV=.venv-latest CONSTRAINTS=constraints-latest.txt EXTRAS=benchmarks,test,timm

SMOKE := runs/smoke
results-smoke: $(VENV)/ready
	rm -rf $(SMOKE)
	$(PY) benchmarks/measure/results.py --config configs/results-smoke.yaml --workers 2 --out $(SMOKE)/results.csv
	$(PY) benchmarks/measure/throughput.py --network resnet20 --keeps 0.2 --batch 16 --seconds 5 --out $(SMOKE)/throughput.csv
	$(PY) -W ignore benchmarks/measure/scale.py --network resnet18 --convs dense tr --size 64 --out $(SMOKE)/scale.csv
	$(PY) benchmarks/report/tables.py --show results $(SMOKE)/results.csv \
		--show throughput $(SMOKE)/throughput.csv --show scale $(SMOKE)/scale.csv

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

clean:
	rm -rf $(VENV) $(BASE) .venv-latest runs docs/_build docs/tutorials docs/reference/layers
