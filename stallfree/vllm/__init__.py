"""The `slo` policy inside vLLM: a scheduler class for `--scheduler-cls stallfree.vllm.SloScheduler`, and a device that is not
there.

Each module here imports vLLM, so this one imports them only when their classes are asked for. Nothing else of the project imports
this package.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "SloScheduler":
        from stallfree.vllm.scheduler import SloScheduler

        return SloScheduler
    if name == "PretendWorker":
        from stallfree.vllm.pretend import PretendWorker

        return PretendWorker
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
