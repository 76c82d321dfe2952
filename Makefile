# Two commands on a fresh machine: `make serve` and `make test`. Both make .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: serve test test-all install lint clean

serve: install
	$(BIN)/stallfree serve

install: .venv/installed

.venv/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "stallfree needs Python 3.11 or later; make PYTHON=... names one")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e .
	touch $@

.venv/tested: pyproject.toml .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@

lint: .venv/tested
	$(BIN)/ruff check --output-format concise .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/pytest -n 2 --dist loadfile
	@echo; echo "lines per file:"; git ls-files 'stallfree/*.py' | xargs wc -l | sort -rn

test-all: lint
	$(BIN)/pytest -n 2 --dist loadfile -m 'slow or not slow'

clean:
	rm -rf .venv build dist
