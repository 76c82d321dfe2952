"""These tests need vLLM, which is large: `make test-vllm` has an environment of its own for it. The others need only this
project."""

from importlib.util import find_spec

WITH_VLLM = ["test_contract_real.py", "test_default.py", "test_greedy.py", "test_scheduler.py", "test_serving.py"]
collect_ignore = [] if find_spec("vllm") else WITH_VLLM
