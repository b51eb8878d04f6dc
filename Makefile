# make demo   sets up and trains a dense and a tensor-ring ResNet side by side on real images
# make test   sets up and runs the tests
# make results-smoke   the pipeline of the results, training to tables, in two minutes on small images
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
VENV ?= .venv
PY := $(VENV)/bin/python

.PHONY: demo test test-slow results-smoke lint clean

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

SMOKE := runs/smoke
results-smoke: $(VENV)/ready
	rm -rf $(SMOKE)
	$(PY) benchmarks/results.py --config configs/results-smoke.yaml --workers 2 --out $(SMOKE)/results.csv
	$(PY) benchmarks/throughput.py --network resnet20 --keeps 0.2 --batch 16 --seconds 5 --out $(SMOKE)/throughput.csv
	$(PY) -W ignore benchmarks/scale.py --network resnet18 --convs dense tr --size 64 --out $(SMOKE)/scale.csv
	$(PY) benchmarks/report.py --show results $(SMOKE)/results.csv --show presets $(SMOKE)/results.csv \
		--show throughput $(SMOKE)/throughput.csv --show scale $(SMOKE)/scale.csv

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) runs
