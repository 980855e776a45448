# What one does here, in the environment of the caller's `python`:
#   make setup    everything for working on the code, in the versions that CI uses, and the commit hook
#   make test     the quick tests (make test TESTS="-m slow", make test TESTS=tests/test_graph.py)
#   make lint     ruff (rules and format) and mypy --strict
#   make docs     the pages into build/docs, every warning an error
#   make mutants  which faults put into the package do the tests miss? (Linux, an hour; goes on where it was stopped)
PYTHON ?= python
TESTS ?=
.PHONY: setup test lint docs mutants

setup:
	$(PYTHON) -m pip install -c constraints.txt -e ".[dev]"
	$(PYTHON) -m pre_commit install

test:
	$(PYTHON) -m pytest $(TESTS)

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

docs:
	$(PYTHON) -m sphinx -W -n --keep-going -q docs build/docs

mutants:
	nice -n 10 $(PYTHON) benchmarks/reliability/mutants.py
	$(PYTHON) benchmarks/reliability/report.py
