"""What this package uses of vLLM is there, as recorded."""

import json
from pathlib import Path

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from stallfree.vllm import contract
from tests.vllm.real import model_folder, request, scheduler

RECORDED = Path(__file__).parent / "signatures.json"


def test_the_recorded_signatures_are_those_of_the_installed_version():
    there = {name: list(contract.signature(name) or ()) for name in contract.USED}
    assert json.loads(RECORDED.read_text())["signatures"] == there


def test_check_accepts_the_installed_version():
    contract.check()


def test_a_scheduler_and_a_request_have_every_attribute(tmp_path):
    for cls in (Scheduler, AsyncScheduler):
        made = scheduler(cls, model_folder(tmp_path))
        assert [name for name in contract.ATTRIBUTES if not hasattr(made, name)] == []
    assert [name for name in contract.OF_A_REQUEST if not hasattr(request("r", [1], 1), name)] == []
