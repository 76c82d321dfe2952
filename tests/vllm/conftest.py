"""These tests need vLLM, which is large: `make test-vllm` has an environment of its own for it. The others need only this
project."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("vllm") else ["test_scheduler.py", "test_default.py", "test_contract_real.py", "test_serving.py"]
